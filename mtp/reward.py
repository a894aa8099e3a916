"""Rewards: rollouts in, the raw outcome and named shaping terms out. Pure functions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .rollout import Rollouts
from .tasks.base import Task
from .text import TextFormat


@dataclass(kw_only=True)
class RewardConfig:
    """Shaping terms, kept apart from the outcome: groups are filtered on the outcome alone."""

    pass_cost: float = 0.0
    """Subtracted per forward pass of main."""
    token_cost: float = 0.0
    """Subtracted per token."""


@dataclass
class Rewards:
    """Of P prompts times G completions."""

    outcomes: Tensor
    """[P, G] 1.0 where the final answer is right, else 0.0."""
    total: Tensor
    """[P, G] outcome plus shaping terms: what advantages are made of."""
    terms: dict[str, Tensor]
    """[P, G] each shaping term."""


def score(task: Task, text: TextFormat, rollouts: Rollouts, config: RewardConfig) -> Rewards:
    """Judge every rollout's final answer; one that has none gets 0.

    Raises ValueError naming the task and the sample if the task's reward raises or is not a finite
    number.
    """
    outcomes = []
    for row in range(len(rollouts.prompts)):
        answer = text.answer_text(rollouts.completion(row))
        outcomes.append(0.0 if answer is None else task.outcome(rollouts.example(row), answer))
    shape = (-1, rollouts.group_size)
    outcome = torch.tensor(outcomes).view(shape)
    terms = {}
    if config.pass_cost:
        terms["passes"] = -config.pass_cost * rollouts.out.passes.float().view(shape)
    if config.token_cost:
        terms["tokens"] = -config.token_cost * rollouts.out.lengths.float().view(shape)
    total = outcome + sum(terms.values(), torch.zeros_like(outcome))
    return Rewards(outcome, total, terms)
