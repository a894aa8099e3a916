"""Legibility of thoughts: likelihood under a frozen reference, true steps, token frequencies.

The measures are pure functions of rollouts. The reference of the measurement must not be the one
that the training loss uses (`mtp.reference`).
"""

import math
from collections import Counter
from typing import Any, NamedTuple

import torch
from mtp_kernels import linear_logprob
from torch import Tensor

from ..modeling.records import pad
from ..tasks.base import Task
from .prompt_format import PromptFormat
from .rollout import Rollouts

ROWS_AT_ONCE = 256
"""Number of segments in one forward of the reference."""


class ThoughtNats(NamedTuple):
    """Statistics of M thought tokens, on the CPU; thoughts are scored in each segment."""

    nats: Tensor
    """[M] float32, -log p of the token under the reference."""
    rollouts: Tensor
    """[M] int64, the rollout of the token's segment."""
    slots: Tensor
    """[M] int64, the slot that wrote it; 0: main."""


@torch.no_grad()
def thought_nats(
    batch: Rollouts, fmt: PromptFormat, reference: Any, impl: str | None = None
) -> ThoughtNats:
    """-log p of every token of the thoughts, their closing delimiters included.

    impl: implementation of `mtp_kernels` ops, by default the fastest of the device.
    """
    found = []
    device = next(reference.parameters()).device
    for first in range(0, len(batch.prompts), ROWS_AT_ONCE):
        chosen = range(first, min(first + ROWS_AT_ONCE, len(batch.prompts)))
        thoughts = [fmt.thought_of(batch.out.completion(r)) for r in chosen]
        prompts = [batch.prompts[r] for r in chosen]
        tokens, lengths = pad([p + t for p, t in zip(prompts, thoughts, strict=True)], fmt.pad_id)
        starts = torch.tensor([len(p) for p in prompts])
        at = torch.arange(tokens.shape[1])
        scored = (at >= starts[:, None] - 1) & (at < lengths[:, None] - 1)
        rows = scored.flatten().nonzero()[:, 0]
        if not len(rows):
            continue
        replayed = reference.replay(tokens.to(device))
        hidden = replayed.main_hidden.flatten(0, 1)[rows.to(device)]
        targets = tokens.flatten()[rows + 1].to(device)
        output = replayed.main_output
        rows_hidden, options = output.rows(hidden), {**output.options, "impl": impl or "auto"}
        stats = linear_logprob(rows_hidden, output.weight, targets, **options)
        nats = -stats.logprob.float().cpu()
        row, position = rows // tokens.shape[1], rows % tokens.shape[1]
        slots = batch.out.slots[first + row, position + 1 - starts[row]]
        found.append(ThoughtNats(nats, torch.tensor(batch.owners)[first + row], slots))
    if not found:
        none = torch.zeros(0, dtype=torch.long)
        return ThoughtNats(torch.zeros(0), none, none)
    return ThoughtNats(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def reference_metrics(measured: list[ThoughtNats], block_size: int) -> dict[str, float | None]:
    """Mean nats per thought token, over all and by slot; None where there are no tokens.

    The exponential of a mean is the reference's perplexity.
    """

    def mean(chosen: list[Tensor]) -> float | None:
        count = sum(len(values) for values in chosen)
        return sum(float(values.sum()) for values in chosen) / count if count else None

    metrics = {"reference_nats_per_token": mean([m.nats for m in measured])}
    for slot in range(block_size):
        metrics[f"reference_nats_slot_{slot}"] = mean([m.nats[m.slots == slot] for m in measured])
    return metrics


def mean_nats_of_rollouts(
    batch: Rollouts, fmt: PromptFormat, reference: Any, impl: str | None = None
) -> Tensor:
    """[P * G] mean nats per thought token of each rollout; 0 for a rollout without a thought."""
    measured = thought_nats(batch, fmt, reference, impl)
    number = len(batch)
    sums = torch.zeros(number).index_add(0, measured.rollouts, measured.nats)
    counts = measured.rollouts.bincount(minlength=number)
    return sums / counts.clamp(min=1)


def thought_passes(batch: Rollouts, fmt: PromptFormat) -> Tensor:
    """[P * G] float32 passes of main in which each thought was written, its delimiter included."""
    return batch.total(torch.tensor([n for n, _ in thoughts_by_segment(batch, fmt)]))


def thoughts_by_segment(batch: Rollouts, fmt: PromptFormat) -> list[tuple[int, int]]:
    """[S] passes and tokens of each segment's thought, its delimiter included.

    A delimiter that was forced without a token before it took no pass.
    """
    found = []
    for segment in range(len(batch.prompts)):
        length = len(fmt.thought_of(batch.out.completion(segment)))
        starts = [at for at in batch.pass_starts(segment) if at < length]
        found.append((sum(int(batch.out.slots[segment, at]) == 0 for at in starts), length))
    return found


def step_metrics(batches: list[Rollouts], task: Task, fmt: PromptFormat) -> dict[str, float | None]:
    """Share of the thoughts' steps that are true, and the number of steps that were checked.

    Both are None for a task whose steps cannot be checked, and the share where there was none. The
    number matters if a task checks only steps that it can read: damaged ones lower it.
    """
    true = total = 0
    for batch in batches:
        for row in range(len(batch)):
            steps = task.true_steps(fmt.thought_text(*batch.completions(row)))
            if steps is None:
                return {"true_steps": None, "steps_per_thought": None}
            true, total = true + steps[0], total + steps[1]
    number = sum(map(len, batches))
    return {"true_steps": true / total if total else None, "steps_per_thought": total / number}


def unigram_drift(batches: list[Rollouts], fmt: PromptFormat) -> float | None:
    """Jensen-Shannon divergence, in bits, of the thoughts' tokens from the solver's traces.

    0: the same frequencies; 1: no token in common. None if some problem has no trace.
    """
    written: Counter[int] = Counter()
    traced: Counter[int] = Counter()
    for batch in batches:
        if any(example.thought is None for example in batch.examples):
            return None
        for example in batch.examples:
            traced.update(fmt.thought_ids(example.thought))
        for segment in range(len(batch.prompts)):
            written.update(fmt.thought_of(batch.out.completion(segment)))
    return jensen_shannon(written, traced) if written and traced else None


def jensen_shannon(first: Counter[int], second: Counter[int]) -> float:
    """Divergence in bits between two tables of counts."""
    totals = first.total(), second.total()
    bits = 0.0
    for token in first.keys() | second.keys():
        p, q = first[token] / totals[0], second[token] / totals[1]
        middle = (p + q) / 2
        bits += sum(x * math.log2(x / middle) for x in (p, q) if x) / 2
    return bits
