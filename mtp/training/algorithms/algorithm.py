"""What a policy-gradient algorithm is: an advantage rule, a ratio, a surrogate and a normaliser.

Everything is packed: one row a token, whoever emitted it. R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ADVANTAGES = ("group_std", "group_mean", "leave_one_out", "batch_std")
"""Rules of `mtp.rollouts.advantage`."""
RATIOS = ("token", "block", "sequence", "rollout")
"""Rules of `mtp.training.algorithms.ratio`."""
NORMALIZERS = ("tokens", "sequences", "rollouts", "length")
"""What a sum over an emitter's tokens is divided by: the number of its tokens; each rollout's by
the number of the emitter's tokens in it, then by the number of such rollouts; the number of
rollouts; the number of rollouts times a fixed length."""

Surrogate = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
"""(ratio [R], log-probability [R], advantage [R], clip_low, clip_high) -> what to maximize [R]."""


def clipped(
    ratio: Tensor, logprob: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """PPO's pessimistic bound, `min(r A, clip(r, 1 - low, 1 + high) A)` (arXiv 1707.06347).

    A token whose ratio has left the range on the side that its advantage favours gives no gradient.
    """
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantages, bounded * advantages)


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A named choice of the four, with its clip range."""

    advantage: str = "group_std"
    ratio: str = "token"
    surrogate: Surrogate = clipped
    normalizer: str = "tokens"
    clip_low: float = 0.2
    clip_high: float = 0.2
