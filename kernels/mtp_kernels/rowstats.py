"""Statistics of one row of logits, computed piece by piece over the vocabulary.

For scaled logits x with running maximum m = max x, over any part of the vocabulary:

    Z = sum exp(x - m)      X = sum exp(x - m) (x - m)      y = x[target], 0 if not in the part

Two parts combine exactly (Milakov & Gimelshein, arXiv 1805.02867, extended by X), which is how
vocabulary tiles, splits and shards on other ranks are put together. From the whole:

    lse = m + log Z        log p(target) = (y - m) - log Z        entropy = log Z - X / Z
"""

from typing import NamedTuple

import torch
from torch import Tensor

NEGATIVE = -1e30
"""Replaces minus infinity where a product with zero follows."""


class RowStats(NamedTuple):
    """Statistics of R rows over one part of the vocabulary; [R], or [parts, R] when stacked."""

    maximum: Tensor
    """m: the largest scaled logit."""
    total: Tensor
    """Z: sum of exp(x - m)."""
    moment: Tensor
    """X: sum of exp(x - m) (x - m), never positive."""
    target: Tensor
    """y: the target's scaled logit, 0 where the target lies in another part."""
    argmax: Tensor
    """int64 vocabulary id of the largest logit, the lowest one of ties."""


def combine(parts: RowStats) -> RowStats:
    """Combines stacked statistics [parts, R] in the order of the parts; ties go to the lower id."""
    maximum = parts.maximum.amax(0)
    relative = (parts.maximum - maximum).clamp_min(NEGATIVE)
    scale = relative.exp()
    return RowStats(
        maximum,
        (parts.total * scale).sum(0),
        (scale * (parts.moment + relative * parts.total)).sum(0),
        parts.target.sum(0),
        _candidates(parts.argmax, parts.maximum, maximum).amin(0),
    )


def _candidates(ids: Tensor, values: Tensor, best: Tensor) -> Tensor:
    """The ids [parts, R] of parts whose value is the best, and a large number elsewhere.

    Where the best is NaN no value equals it: there every id stays, so that the choice is an id.
    """
    return torch.where((values == best) | best.isnan(), ids, torch.iinfo(torch.int64).max)


def finish(stats: RowStats) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), log-sum-exp, entropy), each [R], of statistics over the whole vocabulary.

    A target whose logit is minus infinity has log-probability minus infinity.
    """
    log_total = stats.total.log()
    logprob = ((stats.target - stats.maximum) - log_total).clamp_max(0.0)
    # Kernels keep logits finite.
    logprob = logprob.masked_fill(stats.target <= NEGATIVE / 2, -torch.inf)
    entropy = (log_total - stats.moment / stats.total).clamp_min(0.0)
    return logprob, stats.maximum + log_total, entropy


def combine_best(
    best: Tensor, token: Tensor, picked: Tensor, maximum: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same five, each [R], of parts [parts, R] of the vocabulary; ties go to the lower id."""
    score = best.amax(0)
    candidate = _candidates(token, best, score)
    chosen = candidate.amin(0)
    value = torch.where(candidate == chosen, picked, -torch.inf).amax(0)
    largest = maximum.amax(0)
    z = (total * (maximum - largest).exp()).sum(0)
    return score, chosen, value, largest, z
