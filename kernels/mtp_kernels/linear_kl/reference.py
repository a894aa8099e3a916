"""`linear_kl` as plain PyTorch on all the logits: the definition the other paths are held to."""

import torch
from torch import Tensor

from mtp_kernels.linear_logprob.reference import reference_logits
from mtp_kernels.rowstats import NEGATIVE


def linear_kl_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    index: Tensor,
    reverse: bool,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """[R] divergences in nats, 0 where index [R] is negative; see `linear_kl`."""
    student = reference_logits(hidden, weight, bias, temperature, softcap)
    log_q = torch.log_softmax(student, -1).clamp_min(NEGATIVE)
    valid = index >= 0
    if teacher_hidden.shape[0] == 0:
        return log_q.sum(-1) * 0.0
    # Ids are gathered before the product: the definition makes a teacher row for every student.
    rows = teacher_hidden.index_select(0, index.clamp_min(0))
    teacher = reference_logits(rows, teacher_weight, teacher_bias, temperature, softcap)
    log_p = torch.log_softmax(teacher, -1).clamp_min(NEGATIVE)
    if reverse:
        log_p, log_q = log_q, log_p
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.where(valid, divergence, 0.0)
