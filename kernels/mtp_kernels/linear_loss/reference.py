"""`linear_loss` as plain PyTorch on all the logits, the definition of the other paths."""

import torch
from torch import Tensor

from mtp_kernels.linear_logprob.reference import linear_logprob_reference
from mtp_kernels.linear_loss.objective import row_losses


def linear_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    advantage: Tensor | None,
    old_logprob: Tensor | None,
    clip_low: float,
    clip_high: float,
    z_loss: float,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, log-prob, log-sum-exp, entropy, argmax) of hidden [R, D]; see `linear_loss`."""
    logprob, lse, entropy, argmax = linear_logprob_reference(
        hidden, weight, bias, target, temperature, softcap, ignore_index
    )
    losses = row_losses(logprob, lse, advantage, old_logprob, clip_low, clip_high, z_loss)
    loss = torch.where(target != ignore_index, losses * row_weight, 0.0).sum()
    return loss, logprob.detach(), lse.detach(), entropy.detach(), argmax
