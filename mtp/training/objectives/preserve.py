"""Preservation of slow mode: KL of main's distribution to the reference at every written position.

In fast rollouts main samples one token of a block, so nothing else in the objective constrains main
at the positions that the head filled. Slow mode reads exactly those. This stream is KL(reference ||
main), with a frozen reference, at all positions of the flat text, whichever emitter wrote their
tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..batch import PolicyRows, Rows, TextBatch
from .scored import OutputRows
from .stream import Stream, StreamInputs, Term, mean_where


@dataclass(kw_only=True)
class Preserve(Stream):
    """Settings of the stream `preserve`."""

    scores_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    def counts(self, batch: TextBatch) -> dict[str, float | Tensor]:
        """Number of written tokens, whichever emitter wrote them."""
        return {"preserve": len(batch.main) + is_heads_own(batch).sum()}

    def terms(self, inputs: StreamInputs) -> dict[str, Term]:
        """Sum of the divergence over the written tokens, in nats.

        The distributions are those of temperature 1, whatever the sampler is.
        """
        scored, batch, reference = inputs.scored, inputs.batch, inputs.reference_rows()
        rows = torch.cat([batch.main.positions, batch.head.positions])
        main, own = scored.main, is_heads_own(batch)
        counted = torch.cat([own.new_ones(len(batch.main)), own])
        everywhere = OutputRows(
            scored.flat_hidden[rows], main.output, batch.tokens.flatten()[rows + 1], main.impl
        )
        kl = everywhere.kl(reference.hidden, reference.output, rows, reverse=False)
        metrics = {"preserve/kl": mean_where(kl.detach(), counted)}
        return {"preserve": Term((kl * counted).sum(), self.weight, metrics)}


def is_heads_own(batch: TextBatch) -> Tensor:
    """[R] bool: True for the head's rows whose tokens main has no row for.

    The head's rows of a text that main wrote, a solved one or a slow rollout, are targets of what
    it would have written: main has a row for each of their tokens.
    """

    def places(rows: Rows) -> Tensor:
        if not isinstance(rows, PolicyRows):
            return rows.positions
        return rows.positions + rows.rollouts * batch.tokens.numel()

    return ~torch.isin(places(batch.head), places(batch.main))
