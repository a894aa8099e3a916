"""Main as a reader of vectors: passes with a cache, one after the other, with or without gradients.

The comparators are tiny, so this favours clarity: prompts are padded on the left, and a pass may
read any number of vectors per row.

Shapes: B rows, L vectors of a pass, T positions, D main width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache


class Reader:
    """Main's state after the vectors that it has read so far."""

    def __init__(self, model: Any, prompts: list[list[int]], pad_id: int):
        self.model = model
        self.embedding = model.get_input_embeddings()
        self.prompts, self.mask = padded_left(prompts, pad_id, self.embedding.weight.device)
        self.cache = DynamicCache(config=model.main_config)
        self.num_read = 0
        self.passes = 0
        """Number of passes so far."""

    def read_prompts(self, then: Tensor | None = None) -> Tensor:
        """The first pass, over the prompts and the ids `then` [B, L] after them: hidden rows."""
        ids = self.prompts
        if then is not None:
            ids = torch.cat([ids, then], 1)
            self.mask = torch.cat([self.mask, torch.ones_like(then)], 1)
        return self._read(self.embedding(ids))

    def read(self, vectors: Tensor, mask: Tensor | None = None) -> Tensor:
        """One pass over [B, L, D]: hidden rows [B, L, D] after the final norm.

        mask: [B, L] int64, 0 on padding; None: there is none.
        """
        mask = self.mask.new_ones(vectors.shape[:2]) if mask is None else mask
        self.mask = torch.cat([self.mask, mask], 1)
        return self._read(vectors)

    def _read(self, vectors: Tensor) -> Tensor:
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, self.num_read :]
        out = self.model.mtp_decoder(
            inputs_embeds=vectors,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.num_read, self.passes = self.mask.shape[1], self.passes + 1
        return out.last_hidden_state


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """[..., D] hidden rows after the final norm -> [..., V] float32 logits of main."""
    return model.output_layers()[0].logits(hidden).float()


def read_in_parallel(model: Any, vectors: Tensor) -> Tensor:
    """One causal forward over right-padded [B, T, D]: hidden rows [B, T, D], final norm applied."""
    hidden: Tensor = model.mtp_decoder(inputs_embeds=vectors, use_cache=False).last_hidden_state
    return hidden


def ids_tensor(rows: list[list[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ragged ids -> [B, T] padded on the right, and [B, T] bool where there is a token."""
    longest = max(map(len, rows))
    ids = torch.tensor([ids + [fill] * (longest - len(ids)) for ids in rows], device=device)
    lengths = torch.tensor([len(ids) for ids in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]


def padded_left(rows: list[list[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ragged ids -> [B, T] padded on the left, and [B, T] int64, 0 on padding."""
    longest = max(map(len, rows))
    padded = [[fill] * (longest - len(ids)) + ids for ids in rows]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def embedded(model: Any, ids: list[int]) -> Tensor:
    """[n] ids -> [n, D] inputs of main."""
    embedding = model.get_input_embeddings()
    at = torch.tensor(ids, dtype=torch.long, device=embedding.weight.device)
    vectors: Tensor = embedding(at)
    return vectors


class Inputs(NamedTuple):
    """Inputs of main for one example, and the ids that are scored after them."""

    before: list[int]
    """Ids before the message."""
    message: Tensor
    """[n, D] vectors."""
    after: list[int]
    """Ids after the message."""
    scored: list[int]
    """Ids that follow, at least one."""


def log_probs_of(model: Any, rows: list[Inputs]) -> list[Tensor]:
    """log p of each scored id given all inputs before it: [number of scored ids] for each row."""
    inputs = [
        torch.cat([embedded(model, r.before), r.message, embedded(model, r.after + r.scored[:-1])])
        for r in rows
    ]
    hidden = read_in_parallel(model, pad_sequence(inputs, batch_first=True))
    scored = [row.scored for row in rows]
    at = [
        found[len(vectors) - len(ids) : len(vectors)]
        for found, vectors, ids in zip(hidden, inputs, scored, strict=True)
    ]
    return log_probs_at(model, at, scored)


def log_probs_at(model: Any, hidden: list[Tensor], scored: list[list[int]]) -> list[Tensor]:
    """log p of each row's scored ids, given the hidden rows [n, D] that predict them: [n] each."""
    ids = torch.tensor([i for row in scored for i in row], device=hidden[0].device)
    log_p = logits_of(model, torch.cat(hidden)).log_softmax(-1)
    return list(log_p.gather(-1, ids[:, None])[:, 0].split([len(row) for row in scored]))
