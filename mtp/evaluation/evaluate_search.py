"""Held-out accuracy of a search: of the texts that it chooses, and of the best that it found."""

from collections import defaultdict
from typing import Any

import torch

from ..modeling.branches import Branch, Judge, SearchConfig
from ..modeling.records import pad
from ..modeling.sampler import Sampler
from ..modeling.search import search
from ..rollouts.prompt_format import TextFormat
from ..tasks.base import Example, Task
from .evaluate import held_out

JUDGES = ("logprob", "reward")


def is_right(task: Task, text: TextFormat, example: Example, branch: Branch) -> bool:
    """Whether a text's final answer is right; one without an answer is wrong."""
    answer = text.answer_text(branch.text())
    return answer is not None and task.outcome(example, answer) > 0


def outcome_judge(task: Task, text: TextFormat, examples: list[Example]) -> Judge:
    """1.0 for a branch whose final answer is right, 0.0 for others: `examples` by prompt."""

    def judge(branches: list[Branch]) -> list[float]:
        return [float(is_right(task, text, examples[b.prompt], b)) for b in branches]

    return judge


def evaluate_search(
    model: Any,
    text: TextFormat,
    task: Task,
    config: SearchConfig,
    sampler: Sampler,
    *,
    mode: str,
    judge: str,
    max_new_tokens: int,
    num_problems: int,
    batch_size: int,
    generator: torch.Generator | None = None,
    kernels: str | None = None,
) -> dict[str, Any]:
    """Figures over held-out problems: shares of problems, and means per problem.

    Args:
        model: an mtp model.
        text: tokens and phases.
        task: held-out problems and their judge.
        config: the search; `majority` is over final answers.
        sampler: how branches are drawn.
        mode: as `TextFormat.plan` takes it.
        judge: `logprob`, or `reward`: the task's own outcome. A search that may ask for the outcome
            says what a checker of answers is worth; it is no measure of a model without one.
        max_new_tokens: most tokens of a text.
        num_problems: at most so many held-out problems.
        batch_size: rows decoded at once, at most, where a problem does not take more by itself.
        generator: source of randomness.
        kernels: how tokens are drawn, as in `decode`.

    Raises ValueError for settings that no search can follow, and for a task without right answers.
    """
    if not task.judges:
        raise ValueError(
            f"a search is measured by its right answers, and task {task.name} has none; evaluate "
            "without --search"
        )
    if judge not in JUDGES:
        raise ValueError(f"judge must be one of {list(JUDGES)}, got {judge!r}")
    examples = held_out(task, num_problems)
    rows = {"best_of_n": config.n, "beam": config.n * config.expand, "mcts": config.expand}
    step = max(1, batch_size // rows.get(config.method, 1))
    sums: defaultdict[str, float] = defaultdict(float)
    for at in range(0, len(examples), step):
        asked = examples[at : at + step]
        prompts, lengths = pad([text.prompt_ids(e.prompt) for e in asked], text.pad_id)
        device = next(model.parameters()).device
        found = search(
            model,
            prompts.to(device),
            lengths.to(device),
            text.plan(mode),
            sampler,
            config,
            max_new_tokens=max_new_tokens,
            pad_id=text.pad_id,
            judge=outcome_judge(task, text, asked) if judge == "reward" else None,
            answer_of=text.answer_text,
            generator=generator,
            kernels=kernels,
        )
        for row, (example, texts) in enumerate(zip(asked, found.texts, strict=True)):
            right = [is_right(task, text, example, branch) for branch in texts]
            sums["chosen_accuracy"] += right[texts.index(found.chosen[row])]
            sums["any_right_accuracy"] += any(right)
            sums["mean_accuracy"] += sum(right) / len(right)
            sums["search_texts"] += len(texts)
        sums["search_passes"] += float(found.passes.sum())
        sums["search_tokens_read"] += float(found.tokens_read.sum())
    figures: dict[str, Any] = {name: total / len(examples) for name, total in sums.items()}
    return figures | {"num_problems": len(examples)}
