"""The row-local losses of `linear_loss`, as functions of a row's log-probability and log-sum-exp.

    cross-entropy   l = -logp
    policy          l = -min(r A, clip(r, 1 - low, 1 + high) A),   r = exp(logp - old)

each plus z_loss * lse**2 (the z-loss of PaLM, arXiv 2204.02311). The clipped policy loss is PPO's
(arXiv 1707.06347), its separate upper bound DAPO's (arXiv 2503.14476).
"""

import torch
from torch import Tensor


def row_losses(
    logprob: Tensor,
    lse: Tensor,
    advantage: Tensor | None,
    old_logprob: Tensor | None,
    clip_low: float,
    clip_high: float,
    z_loss: float,
) -> Tensor:
    """[R] losses, differentiable."""
    if advantage is None or old_logprob is None:
        loss = -logprob
    else:
        ratio = (logprob - old_logprob).exp()
        clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
    return loss + z_loss * lse * lse if z_loss else loss


def row_gradients(
    logprob: Tensor,
    lse: Tensor,
    advantage: Tensor | None,
    old_logprob: Tensor | None,
    clip_low: float,
    clip_high: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """([R] dl/dlogp, [R] dl/dlse), in closed form."""
    grad_lse = 2.0 * z_loss * lse
    if advantage is None or old_logprob is None:
        return torch.full_like(logprob, -1.0), grad_lse
    ratio = (logprob - old_logprob).exp()
    stopped = ((advantage > 0) & (ratio > 1.0 + clip_high)) | (
        (advantage < 0) & (ratio < 1.0 - clip_low)
    )
    return torch.where(stopped, 0.0, -advantage * ratio), grad_lse
