"""Preservation of slow mode: main's distribution held to the reference at every written position.

In fast rollouts main samples one token of a block, so nothing else in the objective says what it
would have written at the positions that the head filled. Slow mode reads just those. This stream is
the KL of main to a frozen reference at all positions of the flat text, whoever wrote their tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...modeling.output_layer import OutputLayer
from ...modeling.sampler import Sampler
from ..batch import TextBatch
from .scored import PLAIN, OutputRows, Scored
from .stream import Term, mean_of


@dataclass(kw_only=True)
class Preserve:
    """`preserve`"""

    weight: float = 0.0
    reverse: bool = False
    """False: KL(reference || main). True: KL(main || reference)."""

    def counts(self, batch: TextBatch) -> dict[str, float]:
        """Written tokens of both emitters."""
        return {"preserve": len(batch.main_rows) + len(batch.head_positions)}

    def terms(
        self,
        scored: Scored,
        batch: TextBatch,
        reference_hidden: Tensor,
        reference_output: OutputLayer,
        sampler: Sampler = PLAIN,
    ) -> dict[str, Term]:
        """Sum of the divergence over the written tokens, in nats; see `Leash.terms`.

        The distributions are those of temperature 1, whatever the sampler is.
        """
        rows = torch.cat([batch.main_rows, batch.head_positions])
        main = scored.main
        everywhere = OutputRows(
            scored.flat_hidden[rows], main.output, batch.tokens.flatten()[rows + 1], main.impl
        )
        kl = everywhere.kl(reference_hidden, reference_output, rows, reverse=self.reverse)
        return {"preserve": Term(kl.sum(), self.weight, {"preserve/kl": mean_of(kl.detach())})}
