"""Held-out accuracy and its controls: both modes, an empty and a wrong thought, true steps.

For a head that drafts also verified mode: passes, and which of the drafts main accepted.

Decoding is greedy. Every figure is over the same problems.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..common.bounds import bounded
from ..modeling.decode_options import DecodableModel, DecodeOptions
from ..modeling.records import Decoded
from ..modeling.sampler import Sampler
from ..rollouts.legibility import (
    reference_figures,
    thought_nats,
    true_step_share,
    unigram_drift,
)
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import DecodingConfig, Rollouts, sample
from ..tasks.base import Example, Task
from ..training.sharding import whole
from .spread import ALONE, Spread


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluations during and after a stage."""

    num_problems: int = bounded(512, at_least=1, at_most=10_000_000)
    """Held-out problems of the evaluation that ends a stage."""
    num_interim_problems: int = bounded(128, at_least=1, at_most=10_000_000)
    """Held-out problems of the evaluations within a stage."""
    batch_size: int = bounded(256, at_least=1, at_most=1_000_000)
    num_samples: int = bounded(4, at_least=0)
    """Completions shown in the log after each stage."""
    reference: str = "first"
    """What measures how ordinary thoughts are: main as the `first` stage or a named one left it,
    `start` (the model that the run began from), or a folder that mtp saved. It should not be what
    the loss compares with; `reference_in_loss` in the summary says whether it is."""
    verified: bool = False
    """Decode in verified mode too, where the head drafts and main decides: `verified_passes`,
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
) -> list[Rollouts]:
    """Greedy completions of all examples, in batches of at most `batch_size` on each process."""
    options = DecodeOptions(
        sampler=Sampler(temperature=0),
        max_new_tokens=decoding.max_new_tokens,
        impl=impl,
        any_continues=spread.any_continues,
    )
    places, own = spread.places(len(examples))
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
    return spread.joined(batches, own)


def accuracy(
    batches: list[Rollouts], task: Task, answer_of: Callable[[list[int]], str | None]
) -> float | None:
    """Share of completions whose final answer is right; one without an answer is wrong.

    answer_of: completion ids -> the final answer, None if there is none. The share is None for a
    task that judges no answers.
    """
    if not task.judges:
        return None
    right = total = 0.0
    for batch in batches:
        for row in range(len(batch)):
            answer = answer_of(batch.completion(row))
            if answer is not None:
                right += task.outcome(batch.example(row), answer)
            total += 1
    return right / total


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
    """Accuracy of fast mode on some examples; None for a task that judges no answers."""
    fast = decode_all(model, fmt, examples, "fast", decoding, batch_size, impl=impl, spread=spread)
    return accuracy(fast, task, fmt.answer_text)


def acceptance_by_slot(outs: list[Decoded], num_head_slots: int) -> list[float]:
    """By head slot, the share of passes in which main accepted the draft of that slot."""
    passes = sum(float(out.passes.sum()) for out in outs)
    slots = range(1, num_head_slots + 1)
    return [sum(float((out.accepted == slot).sum()) for out in outs) / passes for slot in slots]


def held_out(task: Task, num_problems: int) -> list[Example]:
    """The first held-out problems, as many as there are at most."""
    size = task.size("test")
    num_problems = num_problems if size is None else min(num_problems, size)
    return [task.example("test", i) for i in range(num_problems)]


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
    impl: str | None = None,
    spread: Spread = ALONE,
) -> tuple[dict[str, Any], list[Rollouts]]:
    """All figures of one evaluation, named as in summary.json, and the completions they are of.

    Args:
        model: an mtp model.
        fmt: tokens and phases.
        task: held-out problems and their judge.
        decoding: phases and limits.
        num_problems: at most so many held-out problems.
        batch_size: rows decoded at once.
        use_head: False leaves the figures of fast and of verified mode null.
        controls: also answer behind an empty and behind a wrong thought (another problem's).
        reference: frozen model for `reference_nats_per_token`, by slot too; null without one.
        verified: decode in verified mode too; its figures are absent otherwise.
        impl: implementation of `mtp_kernels` ops that tokens are sampled with, see `DecodeOptions`.
        spread: the processes that share the problems; all of them get the figures.
    """
    examples = held_out(task, num_problems)
    num_problems = len(examples)

    def passes(batches: list[Rollouts]) -> float:
        return sum(float(b.out.passes.sum()) for b in batches) / num_problems

    def tokens_per_pass(batches: list[Rollouts]) -> float:
        tokens = sum(float(b.out.lengths.sum()) for b in batches)
        return tokens / (passes(batches) * num_problems)

    def completions(mode: str, prefixes: list[list[int]] | None = None) -> list[Rollouts]:
        return decode_all(model, fmt, examples, mode, decoding, batch_size, prefixes, impl, spread)

    slow = completions("slow")
    shown = slow
    figures: dict[str, Any] = {
        "slow_accuracy": accuracy(slow, task, fmt.answer_text),
        "fast_accuracy": None,
        "slow_passes": passes(slow),
        "fast_passes": None,
        "fast_tokens_per_pass": None,
    }
    if use_head:
        shown = fast = completions("fast")
        figures |= {
            "fast_accuracy": accuracy(fast, task, fmt.answer_text),
            "fast_passes": passes(fast),
            "fast_tokens_per_pass": tokens_per_pass(fast),
        }
    if verified:
        names = ("verified_passes", "verified_tokens_per_pass", "acceptance_by_slot")
        figures |= dict.fromkeys(names)
        if use_head:
            drafted = fast
            if fmt.plan("verified") != fmt.plan("fast"):
                drafted = completions("verified")
            figures |= {
                "verified_passes": passes(drafted),
                "verified_tokens_per_pass": tokens_per_pass(drafted),
                "acceptance_by_slot": acceptance_by_slot(
                    [b.out for b in drafted], fmt.block_size - 1
                ),
            }
    figures |= {"empty_thought_accuracy": None, "wrong_thought_accuracy": None}
    if controls and task.judges and fmt.closer is not None:
        empty = [fmt.thought_ids("") for _ in examples]
        given = completions("slow", empty)
        figures["empty_thought_accuracy"] = accuracy(given, task, fmt.bare_answer_text)
        wrong = wrong_thoughts(examples, slow, task, fmt)
        if wrong is not None:
            given = completions("slow", wrong)
            figures["wrong_thought_accuracy"] = accuracy(given, task, fmt.bare_answer_text)
    figures["true_steps"] = true_step_share(shown, task, fmt)
    figures["unigram_drift"] = unigram_drift(shown, fmt)
    figures["reference_nats_per_token"] = None
    if reference is not None:
        mine = shown[spread.rank :: spread.world_size]
        with whole(reference):
            measured = spread.all_of([thought_nats(batch, fmt, reference) for batch in mine])
        figures |= reference_figures(measured, fmt.block_size if use_head else 1)
    if fmt.segments.max_segments > 1:
        figures["segments"] = sum(len(b.prompts) for b in shown) / num_problems
    figures["num_problems"] = num_problems
    return figures, shown


def wrong_thoughts(
    examples: list[Example], own: list[Rollouts], task: Task, fmt: PromptFormat
) -> list[list[int]] | None:
    """For each problem the thought of another problem whose answer is not right here.

    Solver's thoughts where the task has them, else the model's own. None if there is no such
    thought for some problem.
    """
    if all(example.thought is not None for example in examples):
        thoughts = [fmt.thought_ids(example.thought) for example in examples]
    else:
        thoughts = [fmt.split(b.completion(r))[0] for b in own for r in range(len(b))]
    out = []
    for index, example in enumerate(examples):
        for step in range(1, len(examples)):
            other = (index + step) % len(examples)
            closed = bool(thoughts[other]) and thoughts[other][-1] == fmt.thought_ids("")[-1]
            if closed and not task.outcome(example, examples[other].answer):
                out.append(thoughts[other])
                break
        else:
            return None
    return out
