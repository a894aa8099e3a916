"""Held-out accuracy and its controls: both modes, an empty and a wrong thought, true steps.

For a drafting head also verified mode: passes, and acceptance of its drafts.

Decoding is greedy. All metrics are over the same problems.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from ..common.bounds import bounded
from ..modeling.decode_options import DecodableModel, DecodeOptions
from ..modeling.records import Decoded
from ..modeling.sampler import Sampler
from ..reports.progress import Report, no_report
from ..rollouts.legibility import (
    reference_metrics,
    step_metrics,
    thought_nats,
    thought_passes,
    thoughts_by_segment,
    unigram_drift,
)
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import DecodingConfig, Rollouts, sample
from ..tasks.base import Attempt, Example, Split, Task
from ..tasks.projects import projects_of
from ..training.sharding import whole
from .spread import ALONE, Spread

Result = TypeVar("Result")


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluations during and after a stage."""

    num_problems: int = bounded(512, at_least=1, at_most=10_000_000)
    """Held-out problems of the evaluation that ends a stage."""
    num_interim_problems: int = bounded(128, at_least=1, at_most=10_000_000)
    """Held-out problems of the evaluations within a stage."""
    batch_size: int = bounded(256, at_least=1, at_most=1_000_000)
    """Number of problems that are decoded at once."""
    num_samples: int = bounded(4, at_least=0)
    """Completions shown in the log after each stage."""
    reference: str = "first"
    """Model whose likelihood of the thoughts is measured: main at the end of the `first` stage or a
    named one, `start` (the model that the run began from), or a folder that mtp saved. It should
    not be the reference of the loss; `reference_in_loss` in the summary is true if it is."""
    thought_budgets: list[int] = bounded([], at_least=1)
    """Limits on the passes of a thought: fast accuracy is also measured with longer thoughts
    counted as wrong, for each of these limits."""
    verified: bool = False
    """Decode in verified mode too, where the head drafts and main verifies: `verified_passes`,
    `verified_tokens_per_pass` and `acceptance_by_slot`."""


def decode_all(
    model: DecodableModel,
    fmt: PromptFormat,
    examples: list[Example],
    mode: str,
    decoding: DecodingConfig,
    batch_size: int,
    prefixes: list[list[int]] | None = None,
    impl: str | None = None,
    spread: Spread = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Rollouts]:
    """Greedy completions of all examples, in batches of at most `batch_size` on each process.

    With a shared memory the examples, and each batch, are whole projects. progress: called with the
    number of examples that this process has decoded, and of all that it decodes.
    """
    options = DecodeOptions(
        sampler=Sampler(temperature=0),
        max_new_tokens=decoding.max_new_tokens,
        impl=impl,
        compiler=decoding.compiler(),
        any_continues=spread.any_continues,
    )
    size = projects_of(examples) if fmt.segments.is_shared else 1
    places, own = spread.places(len(examples), size)
    progress(0, len(places))
    batches = []
    for at in range(0, len(places), batch_size):
        chosen = places[at : at + batch_size]
        batches.append(
            sample(
                model,
                fmt,
                [examples[place] for place in chosen],
                fmt.plan(mode),
                options,
                prefixes=None if prefixes is None else [prefixes[place] for place in chosen],
            )
        )
        progress(at + len(chosen), len(places))
    return spread.joined(batches, own)


def accuracy(
    batches: list[Rollouts],
    task: Task,
    answer_of: Callable[[list[int]], str | None],
    prefixes: list[list[int]] | None = None,
) -> float | None:
    """Share of completions whose final answer is right; one without an answer is wrong.

    answer_of: completion ids -> the final answer, None if there is none. prefixes: ids of the
    thought that each problem was given; None: none. The share is None for a task without a
    verifier.
    """
    if not task.has_verifier:
        return None
    right = right_answers(batches, task, answer_of, prefixes)
    return sum(right) / len(right)


def budget_metrics(
    batches: list[Rollouts], task: Task, fmt: PromptFormat, budgets: Sequence[int]
) -> dict[str, Any]:
    """Mean passes of the thoughts, and one accuracy per budget.

    An answer after a thought of more passes than the budget counts as wrong.
    """
    counts = torch.cat([thought_passes(batch, fmt) for batch in batches])
    is_right = torch.tensor(right_answers(batches, task, fmt.answer_text))
    return {
        "fast_thought_passes": float(counts.mean()),
        "accuracy_by_budget": [
            float((is_right & (counts <= budget)).float().mean()) for budget in budgets
        ],
    }


def right_answers(
    batches: list[Rollouts],
    task: Task,
    answer_of: Callable[[list[int]], str | None],
    prefixes: list[list[int]] | None = None,
) -> list[bool]:
    """True if the final answer of each completion is right; see `accuracy`."""
    rows = [(batch, row) for batch in batches for row in range(len(batch))]
    answers = [
        (batch.example(row), answer_of(batch.completion(row)), prefix + batch.completion(row))
        for (batch, row), prefix in zip(rows, prefixes or [[]] * len(rows), strict=True)
    ]
    attempts = [Attempt(e, answer, ids) for e, answer, ids in answers if answer is not None]
    scored = iter(task.scored(attempts))
    return [answer is not None and next(scored).outcome == 1.0 for _, answer, _ in answers]


def place_metrics(right: Sequence[bool], examples: Sequence[Example], name: str) -> dict[str, Any]:
    """`{name}_by_place`: accuracy of the problems at each place of their projects.

    Empty if no problem comes after another. right: one for each example.
    """
    places = sorted({example.place for example in examples})
    found = [
        [is_right for is_right, example in zip(right, examples, strict=True) if example.place == at]
        for at in places
    ]
    return {f"{name}_by_place": [sum(one) / len(one) for one in found]} if places[1:] else {}


def accuracy_metrics(
    batches: list[Rollouts], task: Task, fmt: PromptFormat, name: str
) -> dict[str, Any]:
    """Accuracy of completions as the metric `name`, and its `place_metrics`; see `accuracy`."""
    if not task.has_verifier:
        return {name: None}
    right = right_answers(batches, task, fmt.answer_text)
    examples = [batch.example(row) for batch in batches for row in range(len(batch))]
    return {name: sum(right) / len(right), **place_metrics(right, examples, name)}


def fast_accuracy(
    model: DecodableModel,
    fmt: PromptFormat,
    examples: list[Example],
    task: Task,
    decoding: DecodingConfig,
    batch_size: int,
    impl: str | None = None,
    spread: Spread = ALONE,
) -> float | None:
    """Accuracy of fast mode on some examples; None for a task without a verifier."""
    fast = decode_all(model, fmt, examples, "fast", decoding, batch_size, impl=impl, spread=spread)
    return accuracy(fast, task, fmt.answer_text)


def acceptance_by_slot(outs: list[Decoded], num_head_slots: int) -> list[float]:
    """Share of passes in which main accepted the draft of each head slot."""
    passes = sum(float(out.passes.sum()) for out in outs)
    slots = range(1, num_head_slots + 1)
    return [sum(float((out.accepted == slot).sum()) for out in outs) / passes for slot in slots]


def thought_tokens_per_pass(batches: list[Rollouts], fmt: PromptFormat) -> float | None:
    """Tokens of thoughts, with their closing delimiters, over the passes that wrote them."""
    found = [part for batch in batches for part in thoughts_by_segment(batch, fmt)]
    passes, tokens = (sum(values) for values in zip(*found, strict=True))
    return tokens / passes if passes else None


def held_out(task: Task, num_problems: int, split: Split = "test") -> list[Example]:
    """The first `num_problems` problems of a held-out set, or all if there are fewer."""
    size = task.size(split)
    num_problems = num_problems if size is None else min(num_problems, size)
    return [task.example(split, i) for i in range(num_problems)]


def evaluate(
    model: DecodableModel,
    fmt: PromptFormat,
    task: Task,
    decoding: DecodingConfig,
    *,
    num_problems: int,
    batch_size: int,
    use_head: bool,
    controls: bool = True,
    reference: Any = None,
    verified: bool = False,
    thought_budgets: Sequence[int] = (),
    impl: str | None = None,
    split: Split = "test",
    spread: Spread = ALONE,
    report: Report = no_report,
) -> tuple[dict[str, Any], dict[str, list[Rollouts]]]:
    """All metrics of one evaluation, named as in summary.json, and the completions by mode.

    Args:
        model: an mtp model.
        fmt: tokens and phases.
        task: held-out problems and their verifier.
        decoding: phases and limits.
        num_problems: maximum number of held-out problems.
        batch_size: rows decoded at once.
        use_head: False leaves the metrics of fast and of verified mode null.
        controls: also answer after an empty and after a wrong thought (another problem's); null
            where problems share a memory.
        reference: frozen model for `reference_nats_per_token`, by slot too; null without one.
        verified: decode in verified mode too; its metrics are absent otherwise.
        thought_budgets: limits of `accuracy_by_budget`, which is absent without any.
        impl: implementation of `mtp_kernels` ops, see `DecodeOptions`.
        split: held-out set of the task.
        spread: the processes that share the problems; each of them gets all metrics.
        report: called as each batch of problems is decoded, by mode or control.
    """
    examples = held_out(task, num_problems, split)
    num_problems = len(examples)

    def passes(batches: list[Rollouts]) -> float:
        return sum(float(b.out.passes.sum()) for b in batches) / num_problems

    def tokens_per_pass(batches: list[Rollouts]) -> float:
        tokens = sum(float(b.out.lengths.sum()) for b in batches)
        return tokens / (passes(batches) * num_problems)

    def completions(
        mode: str, prefixes: list[list[int]] | None = None, part: str | None = None
    ) -> list[Rollouts]:
        of_set = f"{split.replace('_', ' ')}, " if len(task.test_sets) > 1 else ""
        progress = partial(report, of_set + (part or mode))
        return decode_all(
            model, fmt, examples, mode, decoding, batch_size, prefixes, impl, spread, progress
        )

    slow = completions("slow")
    decoded, shown = {"slow": slow}, slow
    metrics: dict[str, Any] = {
        **accuracy_metrics(slow, task, fmt, "slow_accuracy"),
        "fast_accuracy": None,
        "slow_passes": passes(slow),
        "fast_passes": None,
        "fast_tokens_per_pass": None,
        "thought_tokens_per_pass": None,
    }
    if use_head:
        decoded["fast"] = shown = fast = completions("fast")
        metrics |= {
            **accuracy_metrics(fast, task, fmt, "fast_accuracy"),
            "fast_passes": passes(fast),
            "fast_tokens_per_pass": tokens_per_pass(fast),
            "thought_tokens_per_pass": thought_tokens_per_pass(fast, fmt),
        }
        if thought_budgets and task.has_verifier:
            metrics |= budget_metrics(fast, task, fmt, thought_budgets)
    if verified:
        names = ("verified_passes", "verified_tokens_per_pass", "acceptance_by_slot")
        metrics |= dict.fromkeys(names)
        if use_head:
            drafted = fast
            if fmt.plan("verified") != fmt.plan("fast"):
                decoded["verified"] = drafted = completions("verified")
            metrics |= {
                "verified_passes": passes(drafted),
                "verified_tokens_per_pass": tokens_per_pass(drafted),
                "acceptance_by_slot": acceptance_by_slot(
                    [b.out for b in drafted], fmt.block_size - 1
                ),
            }
    metrics |= {"empty_thought_accuracy": None, "wrong_thought_accuracy": None}
    # A thought that is given writes no memory, so later problems of a project would lack theirs.
    has_controls = controls and task.has_verifier and not fmt.segments.is_shared
    if has_controls and fmt.closer is not None:
        empty = [fmt.thought_ids("") for _ in examples]
        given = completions("slow", empty, "empty thought")
        metrics["empty_thought_accuracy"] = accuracy(given, task, fmt.bare_answer_text, empty)
        wrong = wrong_thoughts(examples, slow, task, fmt, decoding.max_new_tokens)
        if wrong is not None:
            given = completions("slow", wrong, "wrong thought")
            metrics["wrong_thought_accuracy"] = accuracy(given, task, fmt.bare_answer_text, wrong)
    metrics |= step_metrics(shown, task, fmt)
    metrics["unigram_drift"] = unigram_drift(shown, fmt)
    metrics["reference_nats_per_token"] = None
    if reference is not None:
        mine = shown[spread.rank :: spread.world_size]
        with whole(reference):
            nats = [thought_nats(batch, fmt, reference, impl) for batch in mine]
            measured = spread.all_of(nats)
        metrics |= reference_metrics(measured, fmt.block_size if use_head else 1)
    if fmt.segments.max_segments > 1:
        metrics["segments"] = sum(len(b.prompts) for b in shown) / num_problems
    metrics["num_problems"] = num_problems
    return metrics, decoded


def over_test_sets(
    task: Task, evaluate_set: Callable[[Split], tuple[dict[str, Any], Result]]
) -> tuple[dict[str, Any], Result]:
    """The result of `evaluate_set` for the set `test`. If the task names further held-out sets,
    their metrics are in `test_sets`, by the name of the set.
    """
    first, *others = task.test_sets
    metrics, shown = evaluate_set(first)
    sets = {split: evaluate_set(split)[0] for split in others}
    return metrics | ({"test_sets": sets} if sets else {}), shown


def wrong_thoughts(
    examples: list[Example],
    own: list[Rollouts],
    task: Task,
    fmt: PromptFormat,
    max_new_tokens: int,
) -> list[list[int]] | None:
    """A wrong thought for each problem: that of another problem whose answer is not right here.

    The solver's thoughts if the task has them, else the model's own. After a thought there is room
    for the problem's answer within `max_new_tokens`. None if some problem has no such thought.
    """
    if all(example.thought is not None for example in examples):
        thoughts = [fmt.thought_ids(example.thought) for example in examples]
    else:
        thoughts = [fmt.split(b.completion(r))[0] for b in own for r in range(len(b))]
    out = []
    for index, example in enumerate(examples):
        room = max_new_tokens - len(fmt.bare_answer_ids(example.answer))
        for step in range(1, len(examples)):
            other = (index + step) % len(examples)
            closed = bool(thoughts[other]) and thoughts[other][-1] == fmt.thought_ids("")[-1]
            given = fmt.completion_ids(None, examples[other].answer)
            if (
                closed
                and len(thoughts[other]) <= room
                and not task.outcome(example, examples[other].answer, given)
            ):
                out.append(thoughts[other])
                break
        else:
            return None
    return out
