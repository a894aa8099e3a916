"""`linear_logprob` as plain PyTorch on all the logits: the definition that the other paths must
match.
"""

import torch
from torch import Tensor

from mtp_kernels.checks import check_ids
from mtp_kernels.dispatch import statistics_dtype
from mtp_kernels.logits import scale
from mtp_kernels.rowstats import NEGATIVE


def reference_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """[R, V] scaled logits in float32, or in float64 for float64 operands."""
    dtype = statistics_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return scale(hidden.to(dtype) @ weight.to(dtype).T, bias, softcap, temperature)


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-prob, log-sum-exp, entropy, argmax) [R] of hidden [R, D]; see `linear_logprob`."""
    valid = torch.ones_like(target).bool() if ignore_index is None else target != ignore_index
    # An ignored row may hold NaN, which times a gradient of zero would reach all of the weight's.
    hidden = hidden.masked_fill(~valid[:, None], 0.0)
    x = reference_logits(hidden, weight, bias, temperature, softcap)
    target = torch.where(valid, target, 0)
    check_ids("target", target, weight.shape[0])
    lse = torch.logsumexp(x, -1)
    log_p = x - lse[:, None]
    picked = log_p.gather(-1, target[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.clamp_min(NEGATIVE)).sum(-1)
    return (
        torch.where(valid, picked.clamp_max(0.0), 0.0),
        torch.where(valid, lse, 0.0),
        torch.where(valid, entropy, 0.0),
        torch.where(valid, x.argmax(-1), -1),
    )
