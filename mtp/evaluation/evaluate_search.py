"""Held-out accuracy of a search: of the texts that it chooses, and of the best that it found."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

from ..modeling.branches import Branch, Scorer, SearchConfig
from ..modeling.decode_options import DecodableModel, DecodeOptions
from ..modeling.records import pad
from ..modeling.search import search
from ..reports.progress import Report, no_report
from ..rollouts.prompt_format import PromptFormat
from ..tasks.base import Example, Task
from .evaluate import held_out

SCORERS = ("logprob", "reward")


def is_right(task: Task, fmt: PromptFormat, example: Example, branch: Branch) -> bool:
    """True if a text's final answer is right; False without an answer."""
    ids = branch.text()
    answer = fmt.answer_text(ids)
    return answer is not None and task.outcome(example, answer, ids) > 0


def outcome_scorer(task: Task, fmt: PromptFormat, examples: list[Example]) -> Scorer:
    """A scoring function: 1.0 for a branch whose final answer is right, else 0.0. `examples` by
    prompt.
    """

    def scorer(branches: list[Branch]) -> list[float]:
        return [float(is_right(task, fmt, examples[b.prompt], b)) for b in branches]

    return scorer


def evaluate_search(
    model: DecodableModel,
    fmt: PromptFormat,
    task: Task,
    config: SearchConfig,
    options: DecodeOptions,
    *,
    mode: str,
    scorer: str,
    num_problems: int,
    batch_size: int,
    report: Report = no_report,
) -> dict[str, Any]:
    """Metrics over held-out problems: shares of problems, and means per problem.

    Args:
        model: an mtp model.
        fmt: tokens and phases.
        task: held-out problems and their verifier.
        config: the search; `majority` is over final answers.
        options: as in `decode`; rows are padded with the id of `fmt`.
        mode: as `PromptFormat.plan` takes it.
        scorer: `logprob`, or `reward`: the task's own outcome. A search that ranks by the outcome
            measures the value of a verifier, not of a model without one.
        num_problems: maximum number of held-out problems.
        batch_size: maximum number of rows decoded at once, unless one problem takes more.
        report: called as each batch of problems is searched, with the method.

    Raises ValueError for settings that no search can follow, and for a task without a verifier.
    """
    if not task.has_verifier:
        raise ValueError(
            f"a search is evaluated by a verifier, and task {task.name} has none; evaluate without "
            "--search"
        )
    if scorer not in SCORERS:
        raise ValueError(f"scorer must be one of {list(SCORERS)}, got {scorer!r}")
    if fmt.segments.is_shared:
        raise ValueError(
            "a search writes one segment, so no problem passes a memory to the next, got "
            "decoding.segments.memory_scope=shared; evaluate without --search"
        )
    examples = held_out(task, num_problems)
    rows = {"best_of_n": config.n, "beam": config.n * config.expand, "mcts": config.expand}
    step = max(1, batch_size // rows.get(config.method, 1))
    sums: defaultdict[str, float] = defaultdict(float)
    report(config.method, 0, len(examples))
    for at in range(0, len(examples), step):
        asked = examples[at : at + step]
        prompts, lengths = pad([fmt.question_ids(e) for e in asked], fmt.pad_id)
        device = next(model.parameters()).device
        found = search(
            model,
            prompts.to(device),
            lengths.to(device),
            fmt.plan(mode),
            replace(options, pad_id=fmt.pad_id),
            config,
            scorer=outcome_scorer(task, fmt, asked) if scorer == "reward" else None,
            answer_of=fmt.answer_text,
        )
        for row, (example, texts) in enumerate(zip(asked, found.texts, strict=True)):
            right = [is_right(task, fmt, example, branch) for branch in texts]
            sums["chosen_accuracy"] += right[texts.index(found.chosen[row])]
            sums["any_right_accuracy"] += any(right)
            sums["mean_accuracy"] += sum(right) / len(right)
            sums["search_texts"] += len(texts)
        sums["search_passes"] += float(found.passes.sum())
        sums["search_tokens_read"] += float(found.tokens_read.sum())
        report(config.method, at + len(asked), len(examples))
    metrics: dict[str, Any] = {name: total / len(examples) for name, total in sums.items()}
    return metrics | {"num_problems": len(examples)}
