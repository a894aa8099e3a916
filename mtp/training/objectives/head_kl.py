"""Distillation: trains the head's distribution towards main's own for the same token.

The divergence is KL(main || head), which covers main's mass. Teacher rows are main's at the
position of the flat text that predicts the slot's token; no gradient flows into them.
"""

from dataclasses import dataclass

from ..batch import TextBatch
from .stream import Stream, StreamInputs, Term


@dataclass(kw_only=True)
class HeadKL(Stream):
    """Settings of the stream `head_kl`."""

    def counts(self, batch: TextBatch) -> dict[str, float]:
        """Number of the head's tokens."""
        return {"head_kl": len(batch.head)}

    def terms(self, inputs: StreamInputs) -> dict[str, Term]:
        """Sum of the divergence over the head's tokens, in nats."""
        scored = inputs.scored
        kl = scored.head.kl(
            scored.flat_hidden.detach(),
            scored.main.output.detach(),
            inputs.batch.head.positions,
            reverse=False,
        )
        return {"head_kl": Term(kl.sum(), self.weight, {})}
