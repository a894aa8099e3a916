"""Measures of a trained channel, defined once for all of them.

Passes are forward passes of main that must follow each other. Accuracy at N passes is defined as by
`evaluation.thought_budgets` in ordinary runs: an answer after a thought of more than N passes is
wrong. Attempts differ by their sampled thoughts; the answer after a thought is greedy.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import mtp_kernels.flops  # noqa: F401  (operators hide their products from the counter)
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..evaluation.evaluate import decode_all, held_out, place_metrics, right_answers
from ..modeling.sampler import Sampler
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import DecodingConfig
from ..tasks.base import Example, Split, Task
from .channel import Channel, WriteOptions, Written
from .reading import Inputs, embedded, log_probs_of

SEEDS_OF_ATTEMPT = 1_000_000
"""Distance between the seeds of two attempts, more than the number of problems. torch's generator
on a CPU reads the lowest 32 bits of a seed, so a multiple of 2^32 would repeat the attempt."""

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Limits on the passes of a thought at which accuracy is measured."""


def write_all(
    model: Any,
    fmt: PromptFormat,
    channel: Channel,
    examples: list[Example],
    options: WriteOptions,
    batch_size: int,
) -> list[Written]:
    """One output for each example; each batch has a seed of its own."""
    out = []
    for at in range(0, len(examples), batch_size):
        seeded = replace(options, seed=options.seed + at)
        out += channel.write(model, fmt, examples[at : at + batch_size], seeded)
    return out


def usual_options(channel: Channel, max_new_tokens: int) -> WriteOptions:
    """Greedy thoughts, except those of a channel that is random by definition; greedy answers."""
    sampler = Sampler(temperature=1.0 if channel.is_random else 0.0)
    return WriteOptions(sampler=sampler, max_new_tokens=max_new_tokens)


def is_right(task: Task, example: Example, output: Written) -> bool:
    """True if the answer is right."""
    return output.answer is not None and task.outcome(example, output.answer) == 1.0


def evaluate_channel(
    model: Any,
    fmt: PromptFormat,
    channel: Channel,
    task: Task,
    *,
    num_problems: int,
    batch_size: int,
    max_new_tokens: int,
    budgets: Sequence[int] = (),
    split: Split = "test",
) -> dict[str, Any]:
    """Accuracy and passes on a held-out set of problems, named as in summary.json.

    Thoughts are greedy, except those of a channel that is random by definition; answers are greedy.
    """
    examples = held_out(task, num_problems, split)
    options = usual_options(channel, max_new_tokens)
    outputs = write_all(model, fmt, channel, examples, options, batch_size)
    right = [is_right(task, e, w) for e, w in zip(examples, outputs, strict=True)]
    metrics: dict[str, Any] = {
        "accuracy": fmean(right),
        "passes": fmean(w.passes for w in outputs),
        "thought_passes": fmean(w.thought_passes for w in outputs),
        "num_problems": len(examples),
        **place_metrics(right, examples, "accuracy"),
    }
    if budgets:
        metrics["accuracy_by_budget"] = [
            fmean(r and w.thought_passes <= n for r, w in zip(right, outputs, strict=True))
            for n in budgets
        ]
    return metrics


def measure_attempts(
    model: Any,
    fmt: PromptFormat,
    channel: Channel,
    task: Task,
    *,
    num_problems: int,
    num_attempts: int,
    temperature: float,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """Several attempts per held-out problem, whose thoughts are sampled.

    `mean_accuracy`: of single attempts. `best_accuracy`: some attempt is right.
    `majority_accuracy`: the most frequent answer is right, the first of equally frequent ones.
    `majority_gain`: majority minus mean; 0 where attempts cannot differ.
    """
    examples = held_out(task, num_problems)
    options = WriteOptions(sampler=Sampler(temperature=temperature), max_new_tokens=max_new_tokens)
    attempts = [
        write_all(
            model,
            fmt,
            channel,
            examples,
            replace(options, seed=(n + 1) * SEEDS_OF_ATTEMPT),
            batch_size,
        )
        for n in range(num_attempts)
    ]
    single, best, majority = [], [], []
    for i, example in enumerate(examples):
        outputs = [outputs[i] for outputs in attempts]
        right = [is_right(task, example, output) for output in outputs]
        votes = Counter(o.answer for o in outputs if o.answer is not None)
        chosen = votes.most_common(1)[0][0] if votes else None
        first = next((n for n, o in enumerate(outputs) if o.answer == chosen), 0)
        single.append(fmean(right))
        best.append(any(right))
        majority.append(right[first])
    return {
        "mean_accuracy": fmean(single),
        "best_accuracy": fmean(best),
        "majority_accuracy": fmean(majority),
        "majority_gain": fmean(majority) - fmean(single),
    }


def measure_message(
    model: Any,
    fmt: PromptFormat,
    channel: Channel,
    task: Task,
    *,
    num_problems: int,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float | None]:
    """Bits of a message that its answer depends on, by interventions on the message.

        log2 p(answer | question, its own message) - log2 p(answer | question, another message)

    The message is a thought's inputs, or what else the channel passes on. `message_swap_bits`: the
    message of another problem. `message_zero_bits`: as many vectors of zeros. The answer is the
    model's own. Means over problems whose message ended; both are 0 where the answer follows from
    the question alone. They have no upper limit, since a wrong message can make an answer
    arbitrarily unlikely.
    """
    examples = held_out(task, num_problems)
    options = usual_options(channel, max_new_tokens)
    outputs = write_all(model, fmt, channel, examples, options, batch_size)
    chosen = [
        (example, output, output.vectors)
        for example, output in zip(examples, outputs, strict=True)
        if output.answer and len(output.text) > 1 and output.vectors is not None
    ]
    if len(chosen) < 2:
        return {"message_swap_bits": None, "message_zero_bits": None}
    problems, texts, messages = (list(part) for part in zip(*chosen, strict=True))
    at = task.project_size % len(messages) or 1  # a problem of another project
    others = messages[at:] + messages[:at]
    own, swapped, zero = (
        channel.answer_log_probs(model, fmt, problems, texts, given)
        for given in (messages, others, [0 * message for message in messages])
    )
    bits = 1 / math.log(2)
    return {
        "message_swap_bits": bits * float((own - swapped).mean()),
        "message_zero_bits": bits * float((own - zero).mean()),
    }


def measure_reader(
    model: Any,
    fmt: PromptFormat,
    channel: Channel,
    task: Task,
    reader: Any,
    *,
    num_problems: int,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float | None]:
    """Accuracy of a model that was trained on text alone, given the thoughts' transcripts.

    `reader_accuracy`: its greedy answer to question and transcript is right; a thought without a
    transcript, or with one of `max_new_tokens` tokens or more, counts as wrong. `reader_nats`: mean
    -log p of a transcript's tokens under it, the closing delimiter included; None without
    transcripts. A transcript of vectors names the likeliest tokens of each (`likely_tokens`), or
    the tokens that were sampled.

    reader: frozen, with the same vocabulary.
    """
    examples = held_out(task, num_problems)
    options = usual_options(channel, max_new_tokens)
    outputs = write_all(model, fmt, channel, examples, options, batch_size)
    read = [
        (example, thought)
        for example, output in zip(examples, outputs, strict=True)
        if output.transcript is not None
        and len(thought := fmt.thought_ids(output.transcript)) < max_new_tokens
    ]
    chosen, thoughts = [example for example, _ in read], [thought for _, thought in read]
    decoding = DecodingConfig(max_new_tokens=max_new_tokens)
    batches = decode_all(reader, fmt, chosen, "slow", decoding, batch_size, thoughts)
    right = right_answers(batches, task, fmt.bare_answer_text)
    nothing = embedded(reader, [])
    rows = [Inputs(fmt.question_ids(e), nothing, [], thought) for e, thought in read]
    nats: list[float] = []
    with torch.no_grad():
        for at in range(0, len(rows), batch_size):
            for found in log_probs_of(reader, rows[at : at + batch_size]):
                nats += (-found).tolist()
    return {
        "reader_accuracy": sum(right) / len(examples),
        "reader_nats": fmean(nats) if nats else None,
    }


@dataclass(frozen=True)
class TrainingCost:
    """Cost of training on solved examples, measured on one batch."""

    sequential_passes: int
    """Forward passes of main that must follow each other."""
    bytes_per_example: float
    """Bytes that the forward keeps for the backward, weights not included."""
    seconds_per_example: float
    """Seconds of forward and backward."""
    flops_per_example: float
    """Floating-point operations of forward and backward: those of matrix products."""


def training_cost(
    model: Any, fmt: PromptFormat, channel: Channel, examples: list[Example], *, step: int
) -> TrainingCost:
    """Measure the loss and its gradient on a batch, at an optimizer step of the stage."""
    passes = 0
    parameters = [*model.parameters(), *channel.parameters()]
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for parameter in parameters:
        parameter.requires_grad_(True)
    hook = model.mtp_decoder.register_forward_pre_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = channel.supervised_loss(model, fmt, examples, step=step, seed=0)
    hook.remove()
    del loss
    with FlopCounterMode(display=False) as counter:
        channel.supervised_loss(model, fmt, examples, step=step, seed=0).backward()
    model.zero_grad(set_to_none=True)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        channel.supervised_loss(model, fmt, examples, step=step, seed=0).backward()
        seconds.append(time.perf_counter() - began)
        model.zero_grad(set_to_none=True)
    number = len(examples)
    return TrainingCost(
        passes,
        sum(kept.values()) / number,
        median(seconds) / number,
        counter.get_total_flops() / number,
    )
