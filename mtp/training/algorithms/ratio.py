"""Importance ratios of a token, a block, or a rollout, with the gradient left to each token.

With d_t = log p(t) - log p_old(t) of every token t of a segment,

    token      r_t = exp(d_t)
    block      r_t = exp(sum of d over t's block): the ratio of a pass's action
    rollout    r_t = exp(sum of d over the rollout): the ratio of the whole trajectory
    sequence   r_t = exp(mean of d over the rollout): GSPO's, length-normalized

Beyond `token` the value is the segment's and the gradient is r_t times that of the token's own
log p(t). Summed over a segment that is the gradient of the segment's ratio (times its length for
the mean), and each emitter's tokens can still be divided by a count of their own.
"""

import torch
from torch import Tensor


def importance_ratio(differences: Tensor, kind: str, blocks: Tensor, rollouts: Tensor) -> Tensor:
    """[R] ratios.

    Args:
        differences: [R] log p - log p_old of each token, of all emitters together.
        kind: one of `RATIOS`.
        blocks: [R] int64, equal for the tokens of one pass.
        rollouts: [R] int64, equal for the tokens of one rollout.
    """
    if kind == "token":
        return differences.exp()
    segments = blocks if kind == "block" else rollouts
    fixed = differences.detach()
    level = segment_mean(fixed, segments) if kind == "sequence" else segment_sum(fixed, segments)
    return level.exp() * (differences - fixed).exp()


def segment_sum(values: Tensor, segments: Tensor) -> Tensor:
    """[R] -> [R]: at each row the sum over the rows of its segment."""
    names, inverse = torch.unique(segments, return_inverse=True)
    return values.new_zeros(len(names)).index_add(0, inverse, values)[inverse]


def segment_mean(values: Tensor, segments: Tensor) -> Tensor:
    """[R] -> [R]: at each row the mean over the rows of its segment."""
    return segment_sum(values, segments) / segment_sum(torch.ones_like(values), segments)
