"""Information that the message carries from main to the head, and what a pass passes on, in bits.

Fast rollouts of held-out problems are sampled. At each anchor whose block keeps a token of the
head, the head scores the block's tokens t_1..t_n under its own message m and under others:

    gain(m') = sum over kept slots j of log p(t_j | m, t_<j) - log p(t_j | m', t_<j)

| metric | m' |
|---|---|
| `channel_same_bits` | messages of anchors of the same class: same t_0, another problem |
| `channel_other_bits` | messages of any anchors of other problems |
| `channel_zero_bits` | a message of zeros |

Tokens are sampled under m, so each mean is one of KL divergences: 0 for a head that ignores its
message. `channel_least_bits` compares with the mixture over own and other messages of the class:

    log p(t_1..t_n | m) - log mean over m' in {m, others} of p(t_1..t_n | m')

Its mean is a lower bound of the mutual information of message and block given t_0, and is at most
log2(1 + number of others), `channel_limit_bits` (van den Oord et al., arXiv 1807.03748; Poole et
al., arXiv 1905.06922). `channel_same_bits` is an upper bound of it, by Jensen's inequality, and
`channel_zero_bits` another: the head under zeros is one distribution of the block given t_0, and
the mutual information is the smallest mean divergence from any such one.

`block_entropy_bits` is the sum of the writers' entropies along the block, main's at slot 0 and the
head's after it: the information of the sampled tokens beyond what the context determines, which is
the most that a pass passes on. `token_entropy_bits` is that of slot 0 alone.

All distributions are those of one temperature, without top-k and top-p: a truncated distribution
gives some tokens probability 0, and the difference would be infinite. Means are over the passes of
each problem and then over problems, with t intervals over problems.

Left out: verified phases, where the head's tokens are proposals, and heads that read pairs
(`PairHead`), whose context holds more than the message of an anchor.

Shapes: N anchors, K head slots, M other messages.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..modeling.decode_options import DecodeOptions
from ..modeling.output_layer import OutputLayer
from ..modeling.pairs import PairHead
from ..modeling.sampler import Sampler
from ..reports.interval import mean_interval
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import DecodingConfig, sample
from ..tasks.base import Example
from ..training.collate import collate_rollouts
from ..training.objectives.scored import OutputRows

ANCHORS_AT_ONCE = 512
"""Anchors whose slots the head scores at once."""
BITS = 1 / math.log(2)
"""Bits per nat."""


@dataclass
class Anchors:
    """The anchors of sampled rollouts whose blocks keep a token of the head."""

    context: list[Tensor]
    """The head's context of each anchor, [N, ...] each."""
    slot_inputs: Tensor
    """[N, K] int64: t_0..t_{K-1}."""
    targets: Tensor
    """[N, K] int64: t_1..t_K."""
    kept: Tensor
    """[N, K] bool: True for slots that the block keeps."""
    problems: Tensor
    """[N] int64 problem of each anchor."""
    entropy: Tensor
    """[N] float32 main's entropy at the anchor, in nats."""

    @classmethod
    def join(cls, parts: list["Anchors"]) -> "Anchors":
        """The anchors of several batches."""
        columns = [vars(part) for part in parts]
        context = [torch.cat(same) for same in zip(*(c["context"] for c in columns), strict=True)]
        names = [name for name in columns[0] if name != "context"]
        return cls(context, **{name: torch.cat([c[name] for c in columns]) for name in names})

    def __len__(self) -> int:
        """Number of anchors, N."""
        return len(self.problems)


@dataclass
class Scores:
    """Log-probabilities and entropies of the blocks' tokens, in nats; 0 at slots not kept."""

    own: Tensor
    """[N, K] float64 under the own message."""
    entropy: Tensor
    """[N, K] float64 entropy of the distribution that the slot's token was sampled from."""
    zero: Tensor
    """[N, K] float64 under a message of zeros."""
    same: Tensor
    """[N, M, K] float64 under messages of the anchor's class."""
    has_same: Tensor
    """[N, M] bool: False where the class has fewer than M other messages."""
    other: Tensor
    """[N, M, K] float64 under messages of other problems."""
    has_other: Tensor
    """[N, M] bool."""


def channel_metrics(
    model: Any,
    fmt: PromptFormat,
    examples: list[Example],
    decoding: DecodingConfig,
    *,
    temperature: float,
    num_others: int = 32,
    seed: int = 1,
    batch_size: int = 256,
    impl: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Metrics of the channel, with intervals under `intervals`, see the module.

    Args:
        model: an mtp model with a trained head; it is left in evaluation mode.
        fmt: tokens and phases.
        examples: held-out problems; one of several with the same prompt is used.
        decoding: limits of the rollouts.
        temperature: of all distributions, above 0.
        num_others: maximum number of other messages per anchor, M.
        seed: of the rollouts and of the choice of other messages.
        batch_size: rollouts sampled at once.
        impl: implementation of `mtp_kernels` ops.
        progress: called with the number of finished parts of the work, and of all.

    Raises ValueError if no block keeps a token of the head, for a head that reads pairs, and where
    problems share a memory.
    """
    if isinstance(model.mtp_head, PairHead):
        raise ValueError(
            "the channel is measured on heads whose context is the message of an anchor, got "
            f"head.type={model.mtp_settings.type}, which also reads main's features at earlier "
            "positions; measure a run of another head, such as eavesdrop"
        )
    if fmt.segments.is_shared:
        raise ValueError(
            "the channel is measured on single problems, got "
            "decoding.segments.memory_scope=shared; measure a run whose memory_scope is problem"
        )
    sampler = Sampler(temperature=temperature)
    examples = list({example.prompt: example for example in examples}.values())
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**63 - 1, (len(examples),), generator=generator)
    number = -(-len(examples) // batch_size)
    total = number + 2 * num_others + 2
    parts = []
    model.train(False)
    with torch.no_grad():
        for index in range(number):
            chosen = slice(index * batch_size, (index + 1) * batch_size)
            options = DecodeOptions(
                sampler=sampler,
                max_new_tokens=decoding.max_new_tokens,
                seeds=seeds[chosen],
                impl=impl,
                compiler=decoding.compiler(),
            )
            found = sampled_anchors(model, fmt, examples[chosen], options)
            found.problems += chosen.start
            parts.append(found)
            progress(index + 1, total)
        anchors = Anchors.join(parts)
        if not len(anchors):
            raise ValueError(
                "the channel is measured on tokens of the head, but no block of these rollouts "
                "keeps one; measure a model with a fast phase and a trained head, or more problems"
            )
        output = model.output_layers()[1]

        def scored(context: list[Tensor]) -> tuple[Tensor, Tensor]:
            return slot_stats(model, anchors, context, output, sampler, impl or "auto")

        scores = score_blocks(
            scored, anchors, num_others, seed, lambda done: progress(number + done, total)
        )
    return summarise(anchors, scores) | {
        "num_problems": len(anchors.problems.unique()),
        "num_passes": len(anchors),
    }


def sampled_anchors(
    model: Any, fmt: PromptFormat, examples: list[Example], options: DecodeOptions
) -> Anchors:
    """Fast rollouts of some problems, and their anchors; problems are numbered from 0."""
    batch = sample(model, fmt, examples, fmt.plan("fast"), options)
    segments = list(range(len(batch.prompts)))
    text = collate_rollouts(
        batch.prompts,
        batch.out,
        torch.zeros(len(batch)),
        segments,
        fmt.block_size,
        fmt.pad_id,
        batch.owners,
    )
    text = text.to(next(model.parameters()).device)
    hidden, taps = model.main_hidden(text.tokens, use_cache=False)
    context = model.head_context(taps, text.tokens, text.anchors)
    targets, kept = torch.zeros_like(text.slot_inputs), torch.zeros_like(text.slot_inputs).bool()
    targets.view(-1)[text.head.outputs] = text.head.targets
    kept.view(-1)[text.head.outputs] = True
    main = OutputRows(
        hidden.flatten(0, 1)[text.anchors],
        model.output_layers()[0],
        text.slot_inputs[:, 0],
        options.impl or "auto",
    )
    owners = torch.tensor(batch.owners)[(text.anchors // text.tokens.shape[1]).cpu()]
    entropy = main.stats(options.sampler).entropy if len(text.anchors) else hidden.new_zeros(0)
    return Anchors(context, text.slot_inputs, targets, kept, owners, entropy)


def slot_stats(
    model: Any,
    anchors: Anchors,
    context: list[Tensor],
    output: OutputLayer,
    sampler: Sampler,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N, K] float64 of the blocks' tokens under some context."""
    logprob = torch.zeros(anchors.kept.shape, dtype=torch.float64)
    entropy = torch.zeros_like(logprob)
    for first in range(0, len(anchors), ANCHORS_AT_ONCE):
        chosen = slice(first, first + ANCHORS_AT_ONCE)
        embeds = model.head_embed(anchors.slot_inputs[chosen])
        hidden = model.mtp_head([part[chosen] for part in context], embeds)
        kept = anchors.kept[chosen]
        rows = OutputRows(hidden[kept], output, anchors.targets[chosen][kept], impl)
        stats = rows.stats(sampler)
        is_kept = kept.cpu()
        logprob[chosen][is_kept] = stats.logprob.double().cpu()
        entropy[chosen][is_kept] = stats.entropy.double().cpu()
    return logprob, entropy


def score_blocks(
    scored: Callable[[list[Tensor]], tuple[Tensor, Tensor]],
    anchors: Anchors,
    num_others: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Scores of all blocks under own and other messages.

    scored: context of each anchor -> log-probabilities and entropies [N, K] of its block.
    """
    own, entropy = scored(anchors.context)
    zero, _ = scored([torch.zeros_like(part) for part in anchors.context])
    progress(2)
    done = 2
    found = []
    problems = anchors.problems.tolist()
    classes = anchors.slot_inputs[:, 0].tolist()
    for purpose, labels in (("same", classes), ("other", [0] * len(anchors))):
        rng = random.Random(f"{seed}/{purpose}")
        chosen = other_anchors(labels, problems, num_others, rng)
        exists = chosen >= 0
        columns = []
        for column in chosen.clamp(min=0).T:
            where = column.to(anchors.slot_inputs.device)
            columns.append(scored([part[where] for part in anchors.context])[0])
            done += 1
            progress(done)
        found.append((torch.stack(columns, 1), exists))
    (same, has_same), (other, has_other) = found
    return Scores(own, entropy, zero, same, has_same, other, has_other)


def other_anchors(
    labels: Sequence[int], problems: Sequence[int], num_others: int, rng: random.Random
) -> Tensor:
    """[N, M] indices of other anchors with an anchor's label and another problem; -1: no further.

    Each row is sampled without replacement.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    chosen = torch.full((len(labels), num_others), -1)
    for index, label in enumerate(labels):
        mine = [other for other in members[label] if problems[other] != problems[index]]
        picked = rng.sample(mine, min(num_others, len(mine)))
        chosen[index, : len(picked)] = torch.tensor(picked, dtype=torch.long)
    return chosen


def mean_over_others(values: Tensor, exists: Tensor) -> Tensor:
    """[N, M, K] and [N, M] -> [N, K] mean over the other messages that exist; NaN without any."""
    weight = exists[..., None].double()
    return torch.where(exists[..., None], values, 0.0).sum(1) / weight.sum(1)


def mixture_gain(own: Tensor, others: Tensor, exists: Tensor) -> Tensor:
    """[N, K] nats by slot: own log-probability minus that of the mixture over all messages.

    The mixture's log-probability of slot j given the slots before it is the difference of those of
    t_1..t_j and t_1..t_{j-1}, so that the slots add up to the block. NaN without another message.
    """
    others = torch.where(exists[..., None], others, -torch.inf)
    each = torch.cat([own[:, None], others], 1).cumsum(-1)  # [N, 1 + M, K]
    number = (1 + exists.sum(1)).double()
    mixed = each.logsumexp(1) - number.log()[:, None]
    mixed = torch.cat([mixed[:, :1], mixed.diff(dim=1)], 1)
    return torch.where(exists.any(1)[:, None], own - mixed, torch.nan)


def summarise(anchors: Anchors, scores: Scores) -> dict[str, Any]:
    """Bits per pass and by slot, and their intervals under `intervals`."""
    kept = anchors.kept.cpu()
    entropies = torch.cat([anchors.entropy.double().cpu()[:, None], scores.entropy], 1)
    by_slot = {
        "channel_same": scores.own - mean_over_others(scores.same, scores.has_same),
        "channel_other": scores.own - mean_over_others(scores.other, scores.has_other),
        "channel_zero": scores.own - scores.zero,
        "channel_least": mixture_gain(scores.own, scores.same, scores.has_same),
        "block_entropy": entropies,
    }
    limit = (1 + scores.has_same.sum(1)).double().log()
    per_pass = {name: values.sum(1) for name, values in by_slot.items()} | {
        "channel_limit": torch.where(scores.has_same.any(1), limit, torch.nan),
        "token_entropy": entropies[:, 0],
    }
    problems = anchors.problems
    metrics: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for name, values in per_pass.items():
        metrics[f"{name}_bits"], intervals[f"{name}_bits"] = over_problems(values, problems)
    for name, values in by_slot.items():
        is_kept = torch.cat([torch.ones_like(kept[:, :1]), kept], 1)[:, -values.shape[1] :]
        columns = [
            over_problems(values[is_kept[:, slot], slot], problems[is_kept[:, slot]])
            for slot in range(values.shape[1])
        ]
        key = f"{name}_bits_by_slot"
        metrics[key], intervals[key] = (list(column) for column in zip(*columns, strict=True))
    metrics["channel_coverage"] = float(scores.has_same.any(1).double().mean())
    return metrics | {"intervals": intervals}


def over_problems(
    nats: Tensor, problems: Tensor
) -> tuple[float | None, tuple[float, float] | None]:
    """Mean in bits over problems of each one's mean, and its t interval; leaves out NaN.

    None for no values, and no interval for one problem.
    """
    known = ~nats.isnan()
    numbers, index = problems[known].unique(return_inverse=True)
    if not len(numbers):
        return None, None
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add(0, index, nats[known])
    means = (sums / index.bincount() * BITS).tolist()
    if len(means) < 2:
        return means[0], None
    found = mean_interval(means, (0.0, math.inf))  # each measure has a mean of at least 0
    assert found is not None
    return found.center, (found.low, found.high)
