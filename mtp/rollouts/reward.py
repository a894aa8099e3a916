"""Rewards: pure functions from rollouts to the raw outcome and named shaping terms."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..common.bounds import bounded
from ..tasks.base import Attempt, Example, Scored, Task
from .legibility import mean_nats_of_rollouts, thought_passes
from .prompt_format import PromptFormat
from .rollout import Rollouts


@dataclass(kw_only=True)
class RewardConfig:
    """Shaping terms, separate from the outcome: groups are filtered on the outcome alone.

    The advantage uses the outcome plus the terms. Under the group rules the terms give no advantage
    to a group without a solved rollout; `batch_std` has no such filter.
    `thought_budget` is not a shaping term: it decides which outcomes are right.
    """

    thought_budget: int = bounded(0, at_least=0)
    """Most passes of main in the thought of a right outcome: a right answer after a longer thought
    counts as wrong. 0: no limit."""
    score_weight: float = bounded(0.0, at_least=0)
    """Weight of the task's raw score, which is added to the outcome: rewards with degrees."""
    pass_cost: float = bounded(0.0, at_least=0)
    """Cost subtracted per forward pass of main."""
    token_cost: float = bounded(0.0, at_least=0)
    """Cost subtracted per token."""
    format_cost: float = bounded(0.0, at_least=0)
    """Cost subtracted from a rollout without a final answer: its thought was never closed, or it
    never ended."""
    overlong_buffer: int = bounded(0, at_least=0)
    """Number of tokens before decoding.max_new_tokens over which a penalty rises from 0 to 1
    (DAPO's soft overlong punishment), by the longest segment; 0: none."""
    legibility_cost: float = bounded(0.0, at_least=0)
    """Cost subtracted per nat of the mean -log p of the thought's tokens under the stage's
    reference."""


@dataclass
class Rewards:
    """Rewards of P prompts times G completions."""

    outcomes: Tensor
    """[P, G] 1.0 if the final answer is right and within `thought_budget`, else 0.0."""
    credits: Tensor
    """[P, G] outcomes as advantages read them: with a shared memory their `reward_to_go`."""
    total: Tensor
    """[P, G] outcome plus shaping terms, the input of advantages. With a shared memory it is the
    `reward_to_go` of that sum."""
    terms: dict[str, Tensor]
    """[P, G] each shaping term."""
    scored: list[Scored | None] = field(default_factory=list)
    """[P * G] what the reward functions returned and logged; None without a final answer."""


def reward_to_go(values: Tensor, examples: Sequence[Example]) -> Tensor:
    """[P, G] -> [P, G]: mean of a problem's value and those of the later ones of its project, with
    the same trajectory number.

    So a memory is credited with what later problems make of it. Example, one project of three
    problems, one trajectory: 1, 0, 1 -> 2/3, 1/2, 1. The examples are whole projects, in order.
    """
    out = torch.empty_like(values)
    total, number = torch.zeros_like(values[:1]), 0
    for i in reversed(range(len(examples))):
        total, number = total + values[i], number + 1
        out[i] = total[0] / number
        if examples[i].place == 0:
            total, number = torch.zeros_like(total), 0
    return out


def score(
    task: Task,
    fmt: PromptFormat,
    rollouts: Rollouts,
    config: RewardConfig,
    *,
    max_new_tokens: int,
    reference: Any = None,
    impl: str | None = None,
) -> Rewards:
    """Score every rollout's final answer; a rollout without one gets 0.

    max_new_tokens is the limit that `overlong_buffer` is relative to, reference the frozen model of
    `legibility_cost`, impl the implementation of `mtp_kernels` ops for it. Raises ValueError naming
    the task and the sample if the task's reward raises or is not a finite number.
    """
    completions = [rollouts.completion(row) for row in range(len(rollouts))]
    answers = [fmt.answer_text(ids) for ids in completions]
    attempts = {
        row: Attempt(rollouts.example(row), answer, completions[row])
        for row, answer in enumerate(answers)
        if answer is not None
    }
    found = dict(zip(attempts, task.scored(list(attempts.values())), strict=True))
    scored = [found.get(row) for row in range(len(rollouts))]
    outcomes = [0.0 if one is None else one.outcome for one in scored]
    if config.thought_budget:
        is_late = thought_passes(rollouts, fmt) > config.thought_budget
        outcomes = [0.0 if late else o for late, o in zip(is_late.tolist(), outcomes, strict=True)]
    lengths = rollouts.out.lengths
    terms = {}
    if config.score_weight:
        scores = torch.tensor([0.0 if one is None else one.score for one in scored])
        terms["score"] = config.score_weight * scores
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
        nats = mean_nats_of_rollouts(rollouts, fmt, reference, impl)
        terms["legibility"] = -config.legibility_cost * nats
    shape = (-1, rollouts.group_size)
    outcome = torch.tensor(outcomes).view(shape)
    terms = {name: values.view(shape) for name, values in terms.items()}
    total = outcome + sum(terms.values(), torch.zeros_like(outcome))
    if not fmt.segments.is_shared:
        return Rewards(outcome, outcome, total, terms, scored)
    credits = reward_to_go(outcome, rollouts.examples)
    return Rewards(outcome, credits, reward_to_go(total, rollouts.examples), terms, scored)
