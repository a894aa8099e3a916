"""Rewards: rollouts in, the raw outcome and named shaping terms out. Pure functions."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bounds import bounded
from ..tasks.base import Task
from .legibility import mean_nats_of_rollouts, thought_passes
from .prompt_format import PromptFormat
from .rollout import Rollouts


@dataclass(kw_only=True)
class RewardConfig:
    """Shaping terms, kept apart from the outcome: groups are filtered on the outcome alone.

    The reward that advantages are made of is the outcome plus the terms. Under the group rules none
    of them can make a group in which nothing was solved teach; `batch_std` has no such filter.
    `thought_budget` is not a shaping term: it decides which outcomes are right.
    """

    thought_budget: int = bounded(0, at_least=0)
    """Most passes of main in the thought of a right outcome: a right answer after a longer thought
    counts as wrong. 0: no limit."""
    pass_cost: float = bounded(0.0, at_least=0)
    """Subtracted per forward pass of main."""
    token_cost: float = bounded(0.0, at_least=0)
    """Subtracted per token."""
    format_cost: float = bounded(0.0, at_least=0)
    """Subtracted from a rollout that has no final answer: its thought was never closed, or it never
    ended."""
    overlong_buffer: int = bounded(0, at_least=0)
    """Tokens before decoding.max_new_tokens within which a rollout loses evenly from 0 to 1 (DAPO's
    soft overlong punishment), by its longest segment; 0: none."""
    legibility_cost: float = bounded(0.0, at_least=0)
    """Subtracted per nat of the mean -log p of the thought's tokens under the stage's reference."""


@dataclass
class Rewards:
    """Of P prompts times G completions."""

    outcomes: Tensor
    """[P, G] 1.0 where the final answer is right and within `thought_budget`, else 0.0."""
    total: Tensor
    """[P, G] outcome plus shaping terms: what advantages are made of."""
    terms: dict[str, Tensor]
    """[P, G] each shaping term."""


def score(
    task: Task,
    fmt: PromptFormat,
    rollouts: Rollouts,
    config: RewardConfig,
    *,
    max_new_tokens: int,
    reference: Any = None,
) -> Rewards:
    """Judge every rollout's final answer; one that has none gets 0.

    max_new_tokens is the limit that `overlong_buffer` counts from, reference the frozen model of
    `legibility_cost`. Raises ValueError naming the task and the sample if the task's reward raises
    or is not a finite number.
    """
    answers = [fmt.answer_text(rollouts.completion(row)) for row in range(len(rollouts))]
    outcomes = [
        0.0 if answer is None else task.outcome(rollouts.example(row), answer)
        for row, answer in enumerate(answers)
    ]
    if config.thought_budget:
        is_late = thought_passes(rollouts, fmt) > config.thought_budget
        outcomes = [0.0 if late else o for late, o in zip(is_late.tolist(), outcomes, strict=True)]
    lengths = rollouts.out.lengths
    terms = {}
    if config.pass_cost:
        terms["passes"] = -config.pass_cost * rollouts.total(rollouts.out.passes)
    if config.token_cost:
        terms["tokens"] = -config.token_cost * rollouts.total(lengths)
    if config.format_cost:
        has_none = torch.tensor([answer is None for answer in answers])
        terms["format"] = -config.format_cost * has_none.float()
    if config.overlong_buffer:
        longest = [float(lengths[rollouts.segments_of(r)].max()) for r in range(len(rollouts))]
        over = torch.tensor(longest) - (max_new_tokens - config.overlong_buffer)
        terms["overlong"] = -(over / config.overlong_buffer).clamp(0, 1)
    if config.legibility_cost:
        nats = mean_nats_of_rollouts(rollouts, fmt, reference)
        terms["legibility"] = -config.legibility_cost * nats
    shape = (-1, rollouts.group_size)
    outcome = torch.tensor(outcomes).view(shape)
    terms = {name: values.view(shape) for name, values in terms.items()}
    total = outcome + sum(terms.values(), torch.zeros_like(outcome))
    return Rewards(outcome, total, terms)
