"""Advantages: maps outcomes and shaped rewards of groups to one number per rollout.

A rule is a function of `GroupRewards`. Example, one group of two right and two wrong rollouts:
rewards [[1, 0, 0, 1]] -> `group_mean` [[0.5, -0.5, -0.5, 0.5]].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.registry import Registry

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it."""


@dataclass(frozen=True)
class GroupRewards:
    """Rewards of P groups of G rollouts, one group per prompt."""

    rewards: Tensor
    """[P, G] float32 outcomes plus shaping terms."""
    outcomes: Tensor
    """[P, G] float32 raw outcomes, 1.0 or 0.0."""
    batch: Tensor
    """[P * processes, G] float32 rewards of all processes."""


Advantage = Callable[[GroupRewards], Tensor]
"""Rewards -> [P, G] advantages."""


def informative(outcomes: Tensor) -> Tensor:
    """[P, G] raw outcomes -> [P] bool: False for a group whose outcomes all agree."""
    return (outcomes != outcomes[:, :1]).any(1)


def where_informative(given: GroupRewards, advantages: Tensor) -> Tensor:
    """[P, G] -> [P, G]: zero for a group whose *outcomes* all agree.

    A filter on shaped rewards would keep groups without a solved rollout.
    """
    return torch.where(informative(given.outcomes)[:, None], advantages, 0.0)


def _centred(given: GroupRewards) -> Tensor:
    return given.rewards - given.rewards.mean(1, keepdim=True)


def group_std(given: GroupRewards) -> Tensor:
    """(r - mean of the group) / standard deviation of the group (GRPO)."""
    deviation = given.rewards.std(1, keepdim=True, correction=0)
    return where_informative(given, _centred(given) / (deviation + EPSILON))


def group_mean(given: GroupRewards) -> Tensor:
    """r - mean of the group (Dr.GRPO)."""
    return where_informative(given, _centred(given))


def leave_one_out(given: GroupRewards) -> Tensor:
    """r - mean of the group's other rollouts (RLOO)."""
    size = max(2, given.rewards.shape[1])  # a single rollout has no advantage
    return where_informative(given, _centred(given) * (size / (size - 1)))


def batch_std(given: GroupRewards) -> Tensor:
    """(r - mean of the batch) / standard deviation of the batch (REINFORCE++), unfiltered."""
    return (given.rewards - given.batch.mean()) / (given.batch.std(correction=0) + EPSILON)


ADVANTAGES: Registry[Advantage] = Registry(
    group_std=group_std, group_mean=group_mean, leave_one_out=leave_one_out, batch_std=batch_std
)


@dataclass(kw_only=True)
class AdvantageConfig:
    """Baseline that a reward is compared with."""

    kind: str | None = None
    """Rule of the advantage. `group_std`: (r - mean of the group) / standard deviation of the group
    (GRPO). `group_mean`: without the division (Dr.GRPO). `leave_one_out`: r - mean of the group's
    other rollouts (RLOO). `batch_std`: (r - mean of the batch) / standard deviation of the batch
    (REINFORCE++). None: the rule of `objective.policy.algorithm`."""

    def validate(self, key: str) -> None:
        """Raises ValueError naming the key of an unknown rule."""
        ADVANTAGES.check(self.kind, f"{key}.kind", optional=True)
