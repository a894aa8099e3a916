"""Preservation of slow mode: KL of main's distribution to the reference at every written position.

In fast rollouts main samples one token of a block, so nothing else in the objective constrains main
at the positions that the head filled. Slow mode reads exactly those. This stream is KL(reference ||
main), with a frozen reference, at all positions of the flat text, whichever emitter wrote their
tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..batch import TextBatch
from .scored import OutputRows
from .stream import Stream, StreamInputs, Term, mean_of


@dataclass(kw_only=True)
class Preserve(Stream):
    """Settings of the stream `preserve`."""

    scores_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    def counts(self, batch: TextBatch) -> dict[str, float]:
        """Number of written tokens of both emitters."""
        return {"preserve": len(batch.main) + len(batch.head)}

    def terms(self, inputs: StreamInputs) -> dict[str, Term]:
        """Sum of the divergence over the written tokens, in nats.

        The distributions are those of temperature 1, whatever the sampler is.
        """
        scored, batch, reference = inputs.scored, inputs.batch, inputs.reference_rows()
        rows = torch.cat([batch.main.positions, batch.head.positions])
        main = scored.main
        everywhere = OutputRows(
            scored.flat_hidden[rows], main.output, batch.tokens.flatten()[rows + 1], main.impl
        )
        kl = everywhere.kl(reference.hidden, reference.output, rows, reverse=False)
        return {"preserve": Term(kl.sum(), self.weight, {"preserve/kl": mean_of(kl.detach())})}
