"""Advantages: outcomes and shaped rewards of groups in, one number per rollout out."""

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it."""


@dataclass(kw_only=True)
class AdvantageConfig:
    """The baseline that a reward is compared with."""

    kind: str | None = None
    """`group_std`: (r - mean of the group) / deviation of the group (GRPO). `group_mean`: without
    the division (Dr.GRPO). `leave_one_out`: r - mean of the group's other rollouts (RLOO).
    `batch_std`: (r - mean of the batch) / deviation of the batch (REINFORCE++). None: the rule of
    `objective.policy.algorithm`."""


def informative(outcomes: Tensor) -> Tensor:
    """[P, G] raw outcomes -> [P] bool: False for a group whose outcomes all agree."""
    return (outcomes != outcomes[:, :1]).any(1)


def group_advantages(
    rewards: Tensor, outcomes: Tensor, kind: str, batch: Tensor | None = None
) -> Tensor:
    """Shaped rewards and raw outcomes [P, G] -> advantages [P, G].

    Under the three group rules a group whose *outcomes* all agree gets zero: filtering on a shaped
    reward would keep groups in which nothing was solved. `batch_std` has no group to filter.

    Args:
        rewards: outcomes plus shaping terms.
        outcomes: 1.0 or 0.0.
        kind: see `AdvantageConfig.kind`.
        batch: rewards of all processes, for `batch_std`; None: `rewards` are all there are.
    """
    if kind == "batch_std":
        batch = rewards if batch is None else batch
        return (rewards - batch.mean()) / (batch.std(correction=0) + EPSILON)
    centred = rewards - rewards.mean(1, keepdim=True)
    if kind == "group_std":
        centred = centred / (rewards.std(1, keepdim=True, correction=0) + EPSILON)
    elif kind == "leave_one_out":
        size = max(2, rewards.shape[1])  # alone it has no advantage
        centred = centred * (size / (size - 1))
    return torch.where(informative(outcomes)[:, None], centred, 0.0)
