"""Advantages: outcomes and shaped rewards of groups in, one number per rollout out."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True)
class AdvantageConfig:
    """GRPO's group baseline."""

    std_normalize: bool = True
    """Divide the centred reward by the group's standard deviation + 1e-4 (GRPO). Without it steps
    of a group shrink as its rewards agree (Dr.GRPO)."""


def group_advantages(rewards: Tensor, outcomes: Tensor, config: AdvantageConfig) -> Tensor:
    """Shaped rewards and raw outcomes [P, G] -> advantages [P, G].

    A group whose *outcomes* all agree gets zero: filtering on a shaped reward would keep groups in
    which nothing was solved.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if config.std_normalize:
        centred = centred / (rewards.std(1, keepdim=True, correction=0) + 1e-4)
    agree = (outcomes == outcomes[:, :1]).all(1, keepdim=True)
    return torch.where(agree, 0.0, centred)
