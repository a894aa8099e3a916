"""Channels that pass one vector from a pass to the next and replay a thought in one forward.

At each pass of a thought main's logits give the probability p of the closing delimiter. With
probability p the thought ends; otherwise a vector is made of the distribution q over the other
tokens, q = p(. | not the delimiter), and the next pass reads that vector. The log-probability of a
pass is then

    log p(delimiter)                        if the thought ends
    log(1 - p(delimiter)) + log density     else, of the vector under q

and sums over passes, because everything that a pass depends on is in the record: tokens, and
vectors where tokens do not determine them. So replay is one causal forward over recorded inputs.

Supervision follows CoT2 (Gozeten et al., arXiv 2505.23648): the target of a pass is a distribution
over tokens, uniform over the set of tokens that the task's solver has at that step. Where a task
names the nodes of a search's layers (`Example.columns["layers"]`), these are the sets: a thought of
one vector per layer. Otherwise the sets are the single tokens of the solved thought.

Shapes: B rows, T positions, M tokens of a position, R positions of thoughts, D main width, V
vocabulary.
"""

import math
import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..modeling.sampler import Sampler
from ..rollouts.prompt_format import PromptFormat
from ..tasks.base import Example
from .channel import Channel, WriteOptions, Written, closer_id, plain_text
from .reading import Reader, logits_of, read_in_parallel

LAYER_END = ";"
"""Text between the layers of a solved search."""
NUM_NAMED = 3
"""Most tokens that name a vector in its trace and in its transcript."""


class Thought(NamedTuple):
    """The samples of a pass for R rows."""

    ids: Tensor
    """[R, M] int64 tokens that the vector is made of."""
    record: Tensor
    """[R, E] what replay needs besides: E numbers, none in a discrete channel."""


@dataclass
class Row:
    """One output as a record for replay: prompt, thought, then the delimiter and the answer."""

    prompt: list[int]
    thought: list[list[int]] = field(default_factory=list)
    """Tokens of each vector."""
    records: list[Tensor] = field(default_factory=list)
    """[E] record of each vector; none in solved examples."""
    text: list[int] = field(default_factory=list)
    """Delimiter, answer and end token."""
    log_probs: list[float] = field(default_factory=list)
    """Log-probability of each vector, then of each token of `text`; none in solved examples."""


class Batch(NamedTuple):
    """Rows side by side, padded on the right."""

    ids: Tensor
    """[B, T, M] int64 tokens of each position."""
    weights: Tensor
    """[B, T, M] float32: 1 over the number of tokens, 0 on padding."""
    is_thought: Tensor
    """[B, T] bool."""
    is_text: Tensor
    """[B, T] bool: delimiter, answer and end token."""
    records: Tensor | None
    """[R, E] records of the thoughts' positions in their order; None for solved examples."""


def collate(rows: Sequence[Row], pad_id: int, device: torch.device) -> Batch:
    """Rows as one batch."""
    time = max(len(r.prompt) + len(r.thought) + len(r.text) for r in rows)
    most = max([len(ids) for row in rows for ids in row.thought], default=1)
    ids = torch.full((len(rows), time, most), pad_id)
    weights = torch.zeros(len(rows), time, most)
    is_thought = torch.zeros(len(rows), time, dtype=torch.bool)
    is_text = torch.zeros_like(is_thought)
    for b, row in enumerate(rows):
        begin = len(row.prompt)
        end = begin + len(row.thought)
        stop = end + len(row.text)
        ids[b, :begin, 0] = torch.tensor(row.prompt)
        ids[b, end:stop, 0] = torch.tensor(row.text, dtype=torch.long)
        weights[b, :stop, 0] = 1.0
        for t, tokens in enumerate(row.thought, begin):
            ids[b, t, : len(tokens)] = torch.tensor(tokens)
            weights[b, t, : len(tokens)] = 1 / len(tokens)
        is_thought[b, begin:end] = True
        is_text[b, end:stop] = True
    found = [record for row in rows for record in row.records]
    records = torch.stack(found).to(device) if found else None
    parts = [part.to(device) for part in (ids, weights, is_thought, is_text)]
    return Batch(parts[0], parts[1], parts[2], parts[3], records)


class VectorChannel(Channel):
    """One vector per pass, replayed in one forward."""

    has_log_prob = True
    follows_layers: ClassVar[bool] = True
    """True if a pass is a layer of a search, in tasks that name the layers."""

    @abstractmethod
    def sample_thought(
        self, log_q: Tensor, embedding: nn.Embedding, greedy: bool, generator: torch.Generator
    ) -> Thought:
        """Sample what the next pass reads, given log q [R, V]."""

    @abstractmethod
    def vectors(self, embedding: nn.Embedding, ids: Tensor, record: Tensor) -> Tensor:
        """[R, D] the vectors of recorded thoughts; differentiable."""

    @abstractmethod
    def log_density(
        self, log_q: Tensor, embedding: nn.Embedding, ids: Tensor, record: Tensor
    ) -> Tensor:
        """[R] log-probability (or density) of recorded thoughts under log q [R, V]."""

    def solved_sets(self, fmt: PromptFormat, example: Example) -> list[list[int]]:
        """The solver's set of tokens at each step of a thought, see the module."""
        layers = example.columns.get("layers") if self.follows_layers else None
        return text_sets(fmt, example) if layers is None else layer_sets(fmt, layers)

    def teach(self, sets: list[list[int]], rng: random.Random) -> list[list[int]]:
        """Tokens of each position of a solved thought, given the solver's set of each step."""
        return sets

    def taught_vectors(self, vectors: Tensor, embedding: nn.Embedding, seed: int) -> Tensor:
        """[R, D] inputs of solved thoughts, given the means of their tokens' embeddings."""
        return vectors

    def supervised_loss(
        self, model: Any, fmt: PromptFormat, examples: list[Example], *, step: int, seed: int
    ) -> Tensor:
        rng = random.Random(seed)
        rows = [self.solved_row(fmt, example, rng) for example in examples]
        embedding = model.get_input_embeddings()
        batch = collate(rows, fmt.pad_id, embedding.weight.device)
        inputs = weighted_mean(embedding, batch.ids, batch.weights)
        if bool(batch.is_thought.any()):
            taught = self.taught_vectors(inputs[batch.is_thought], embedding, seed)
            inputs = inputs.masked_scatter(batch.is_thought[..., None], taught)
        scored = (batch.is_thought | batch.is_text)[:, 1:]
        hidden = read_in_parallel(model, inputs[:, :-1])[scored]
        log_p = logits_of(model, hidden).log_softmax(-1)
        ids, weights = batch.ids[:, 1:][scored], batch.weights[:, 1:][scored]
        return -(weights * log_p.gather(-1, ids)).sum(-1).mean()

    def solved_row(self, fmt: PromptFormat, example: Example, rng: random.Random) -> Row:
        """A solved example as a record."""
        thought = self.teach(self.solved_sets(fmt, example), rng)
        text = fmt.completion_ids("", example.answer)
        return Row(fmt.question_ids(example), thought, [], text)

    @torch.no_grad()
    def rollouts(
        self, model: Any, fmt: PromptFormat, prompts: list[list[int]], options: WriteOptions
    ) -> list[Row]:
        """A thought and an answer for each prompt; row i continues prompt i."""
        reader = Reader(model, prompts, fmt.pad_id)
        hidden = reader.read_prompts()[:, -1]
        rows = [Row(prompt) for prompt in prompts]
        return continue_rows(self, reader, hidden, fmt, rows, options)

    def replay(
        self, model: Any, fmt: PromptFormat, rows: Sequence[Row], sampler: Sampler
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of recorded outputs, in one forward with gradients.

        Returns [N] of every vector and token that was sampled, and [N] int64 the row of each.
        """
        embedding = model.get_input_embeddings()
        batch = collate(rows, fmt.pad_id, embedding.weight.device)
        inputs = weighted_mean(embedding, batch.ids, batch.weights)
        at = batch.is_thought
        if bool(at.any()):
            assert batch.records is not None
            made = self.vectors(embedding, batch.ids[at], batch.records)
            inputs = inputs.masked_scatter(at[..., None], made.to(inputs.dtype))
        scored = (at | batch.is_text)[:, 1:]
        logits = logits_of(model, read_in_parallel(model, inputs[:, :-1])[scored])
        ids, at = batch.ids[:, 1:][scored], at[:, 1:][scored]
        out = sampler.log_probs(logits).gather(-1, ids[:, :1])[:, 0]
        if bool(at.any()):
            _, log_go, log_q = split_off(logits[at], closer_id(fmt), sampler)
            density = self.log_density(log_q, embedding, ids[at], batch.records)  # type: ignore[arg-type]
            out = out.masked_scatter(at, log_go + density)
        owners = torch.arange(len(rows), device=out.device)[:, None].expand_as(scored)
        return out, owners[scored]

    def write(
        self, model: Any, fmt: PromptFormat, examples: list[Example], options: WriteOptions
    ) -> list[Written]:
        prompts = [fmt.question_ids(example) for example in examples]
        rows = self.rollouts(model, fmt, prompts, options)
        embedding = model.get_input_embeddings()
        out = []
        for row, example in zip(rows, examples, strict=True):
            vectors = embedding.weight.new_zeros(0, embedding.embedding_dim)
            if row.thought:
                ids = torch.tensor(row.thought, device=vectors.device)
                vectors = self.vectors(embedding, ids, torch.stack(row.records)).detach()
            is_layered = self.follows_layers and "layers" in example.columns
            passes = len(row.thought) + 1
            end = LAYER_END if is_layered else ""
            out.append(written(fmt, row, vectors, passes, len(row.log_probs), end))
        return out


def continue_rows(
    channel: "VectorChannel | None",
    reader: Reader,
    hidden: Tensor,
    fmt: PromptFormat,
    rows: list[Row],
    options: WriteOptions,
) -> list[Row]:
    """Passes until every row has ended.

    hidden: [B, D] the last pass's. channel: None if the rows begin in the answer.
    """
    embedding, device = reader.embedding, hidden.device
    closer = closer_id(fmt)
    generator = torch.Generator(device=device).manual_seed(options.seed)
    greedy = options.sampler.temperature == 0
    text_sampler = options.sampler if options.sample_answer else Sampler(temperature=0)
    thinking = torch.full((len(rows),), channel is not None, device=device)
    running = torch.ones_like(thinking)
    eos = torch.tensor(fmt.eos_ids, device=device)
    while bool(running.any()):
        logits = logits_of(reader.model, hidden)
        tokens, log_probs = text_sampler.sample(logits, generator)
        vectors = embedding(tokens)
        if channel is not None and bool(thinking.any()):
            log_end, log_go, log_q = split_off(logits, closer, options.sampler)
            if greedy:
                ends = logits.argmax(-1) == closer
            else:
                uniform = torch.rand(len(rows), generator=generator, device=device)
                ends = uniform.log() < log_end
            thought = channel.sample_thought(log_q, embedding, greedy, generator)
            density = channel.log_density(log_q, embedding, *thought)
            made = channel.vectors(embedding, *thought)
            goes = thinking & ~ends
            tokens = torch.where(thinking, closer, tokens)
            log_probs = torch.where(thinking, torch.where(ends, log_end, 0.0), log_probs)
            log_probs = torch.where(goes, log_go + density, log_probs)
            vectors = torch.where(goes[:, None], made, embedding(tokens))
        else:
            goes = torch.zeros_like(thinking)
        for b in running.nonzero()[:, 0].tolist():
            rows[b].log_probs.append(float(log_probs[b]))
            if goes[b]:
                rows[b].thought.append(thought.ids[b].tolist())
                rows[b].records.append(thought.record[b])
            else:
                rows[b].text.append(int(tokens[b]))
        thinking = goes
        lengths = torch.tensor([len(r.log_probs) for r in rows], device=device)
        running &= goes | ~torch.isin(tokens, eos)
        running &= lengths < options.max_new_tokens
        if bool(running.any()):
            hidden = reader.read(vectors[:, None])[:, -1]
    return rows


def written(
    fmt: PromptFormat,
    row: Row,
    vectors: Tensor,
    thought_passes: int,
    passes: int,
    step_end: str,
) -> Written:
    """A record as an output.

    vectors: [n, D] of its thought. step_end: text between the steps of a solved thought if each
    vector is a step; empty if each is a token.
    """
    answer = fmt.answer_text(row.text)
    trace = "|".join(str(fmt.tokenizer.decode(sorted(set(ids)))) for ids in row.thought)
    if not row.text:
        return Written(answer, passes, thought_passes, trace)
    steps = [list(dict.fromkeys(ids)) for ids in row.thought]
    if step_end:
        transcript = step_end.join(plain_text(fmt, ids) for ids in steps)
    else:
        transcript = plain_text(fmt, [token for ids in steps for token in ids])
    return Written(answer, passes, thought_passes, trace, vectors, row.text, transcript)


def likely_tokens(log_q: Tensor) -> Tensor:
    """[R, M] the likeliest tokens under log q [R, V], most likely first.

    At most `NUM_NAMED`, and those at least half as likely as the first one, which fills the rest.
    """
    found = log_q.topk(min(NUM_NAMED, log_q.shape[-1]))
    is_likely = found.values >= found.values[:, :1] - math.log(2)
    return torch.where(is_likely, found.indices, found.indices[:, :1])


def weighted_mean(embedding: nn.Embedding, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted means of token embeddings: ids and weights [..., M] -> [..., D]."""
    return (embedding(ids) * weights[..., None]).sum(-2)


def split_off(logits: Tensor, closer: int, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor]:
    """The end of a thought apart from its content.

    [R, V] logits -> log p(closer) [R], log(1 - p(closer)) [R], and log q [R, V] over other tokens.
    """
    log_p = sampler.log_probs(logits)
    is_closer = torch.arange(logits.shape[-1], device=logits.device) == closer
    others = log_p.masked_fill(is_closer, -torch.inf)
    log_go = others.logsumexp(-1)
    return log_p[:, closer], log_go, others - log_go[:, None]


def layer_sets(fmt: PromptFormat, layers: list[str]) -> list[list[int]]:
    """The tokens of each layer of a search."""
    return [fmt.thought_ids(layer)[:-1] for layer in layers]


def text_sets(fmt: PromptFormat, example: Example) -> list[list[int]]:
    """The tokens of a solved thought, each a set of its own."""
    return [[token] for token in fmt.thought_ids(example.thought)[:-1]]
