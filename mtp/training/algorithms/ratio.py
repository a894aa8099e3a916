"""Importance ratios of a token, a block, or a rollout, with the gradient left to each token.

With d_t = log p(t) - log p_old(t) of every token t of a group of tokens,

    token      r_t = exp(d_t)
    block      r_t = exp(sum of d over t's block): the ratio of a pass's action
    rollout    r_t = exp(sum of d over the rollout): the ratio of the whole trajectory
    sequence   r_t = exp(mean of d over the rollout): GSPO's, length-normalized

Beyond `token` the value is the group's and the gradient is r_t times that of the token's own
log p(t). Summed over a group that is the gradient of the group's ratio (times its length for the
mean), and each emitter's tokens can still be divided by a count of their own.

Arguments of a rule: differences [R] float32, d of the tokens of all emitters together; blocks [R]
int64, equal for the tokens of one pass; rollouts [R] int64, equal for the tokens of one rollout.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...common.registry import Registry

Ratio = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(differences, blocks, rollouts) -> [R] ratios."""


def token(differences: Tensor, blocks: Tensor, rollouts: Tensor) -> Tensor:
    """[R] exp(d_t)."""
    return differences.exp()


def block(differences: Tensor, blocks: Tensor, rollouts: Tensor) -> Tensor:
    """[R] exp(sum of d over the block)."""
    fixed = differences.detach()
    return group_sum(fixed, blocks).exp() * (differences - fixed).exp()


def rollout(differences: Tensor, blocks: Tensor, rollouts: Tensor) -> Tensor:
    """[R] exp(sum of d over the rollout)."""
    fixed = differences.detach()
    return group_sum(fixed, rollouts).exp() * (differences - fixed).exp()


def sequence(differences: Tensor, blocks: Tensor, rollouts: Tensor) -> Tensor:
    """[R] exp(mean of d over the rollout)."""
    fixed = differences.detach()
    return group_mean(fixed, rollouts).exp() * (differences - fixed).exp()


RATIOS: Registry[Ratio] = Registry(token=token, block=block, sequence=sequence, rollout=rollout)


def group_sum(values: Tensor, groups: Tensor) -> Tensor:
    """values [R], groups [R] int64 -> [R]: at each row the sum over the rows of its group."""
    index = group_index(groups)
    return torch.zeros_like(values).index_add(0, index, values)[index]


def group_index(groups: Tensor) -> Tensor:
    """groups [R] int64 -> [R] int64: the groups numbered from 0, in the order of their names.

    `torch.unique` does the same, but makes the host wait for a GPU.
    """
    ordered, order = groups.sort(stable=True)
    begins = torch.zeros_like(groups)
    begins[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(groups).scatter_(0, order, begins.cumsum(0))


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """values [R], groups [R] int64 -> [R]: at each row the mean over the rows of its group."""
    return group_sum(values, groups) / group_sum(torch.ones_like(values), groups)
