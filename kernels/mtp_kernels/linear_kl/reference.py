"""`linear_kl` as plain PyTorch on all the logits, the definition of the other paths."""

import torch
from torch import Tensor

from mtp_kernels.linear_kl.problem import Layer, Problem
from mtp_kernels.linear_logprob.reference import reference_logits
from mtp_kernels.rowstats import NEGATIVE


def linear_kl_reference(problem: Problem) -> Tensor:
    """[R] divergences in nats, 0 where the index is negative; see `linear_kl`."""
    student, teacher, index = problem.student, problem.teacher, problem.index
    # An ignored row may hold NaN, which times a gradient of zero would reach all of the weights'.
    ignored = (index < 0)[:, None]
    student = student._replace(hidden=student.hidden.masked_fill(ignored, 0.0))
    log_q = _log_probs(student, problem)
    if teacher.hidden.shape[0] == 0:
        return log_q.sum(-1) * 0.0
    # Rows are gathered before the product: the definition makes a teacher row for every student.
    rows = teacher.hidden.index_select(0, index.clamp_min(0)).masked_fill(ignored, 0.0)
    log_p = _log_probs(teacher._replace(hidden=rows), problem)
    if problem.reverse:
        log_p, log_q = log_q, log_p
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.where(index >= 0, divergence, 0.0)


def _log_probs(layer: Layer, problem: Problem) -> Tensor:
    """[R, V] log-probabilities, finite."""
    logits = reference_logits(*layer, *problem.scaling)
    return torch.log_softmax(logits, -1).clamp_min(NEGATIVE)
