"""A policy-gradient algorithm: four functions and a clip range.

    advantage: rewards of groups -> an advantage per rollout (`mtp.rollouts.advantage`).
    ratio: log-probability differences -> importance ratios (`ratio.py`).
    surrogate: tokens of one emitter -> value to maximize, per token (this file, `cispo.py`).
    normalizer: tokens of one emitter -> divisor of their sum (`normalizer.py`).

Everything is packed: one row per token of any emitter. R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...rollouts.advantage import Advantage, group_std
from .normalizer import Normalizer, per_token
from .ratio import Ratio, token


@dataclass(frozen=True)
class PolicyTokens:
    """Tokens of one emitter, as a surrogate reads them."""

    logprob: Tensor
    """[R] float32 log-probability under the policy, in nats, with gradient."""
    old: Tensor
    """[R] float32 old log-probability of the ratio, in nats."""
    entropy: Tensor
    """[R] float32 entropy of the policy's distribution, in nats, without gradient."""
    ratio: Tensor
    """[R] float32 importance ratio by the algorithm's rule, with gradient."""
    advantage: Tensor
    """[R] float32 advantage of the token's rollout."""
    clip_low: float
    """Lower end of the clip range is 1 - clip_low."""
    clip_high: float
    """Upper end of the clip range is 1 + clip_high."""

    @property
    def clipped_ratio(self) -> Tensor:
        """[R] the ratio within the clip range."""
        return self.ratio.clamp(1 - self.clip_low, 1 + self.clip_high)


Surrogate = Callable[[PolicyTokens], Tensor]
"""Tokens -> [R] values to maximize."""


def clipped(tokens: PolicyTokens) -> Tensor:
    """PPO's pessimistic bound, `min(r A, clip(r, 1 - low, 1 + high) A)` (arXiv 1707.06347).

    A token whose ratio has left the range on the side that its advantage favours gives no gradient.
    """
    return torch.minimum(tokens.ratio * tokens.advantage, tokens.clipped_ratio * tokens.advantage)


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Four functions and a clip range that define an algorithm."""

    advantage: Advantage = group_std
    ratio: Ratio = token
    surrogate: Surrogate = clipped
    normalizer: Normalizer = per_token
    clip_low: float = 0.2
    clip_high: float = 0.2
