"""Acceptance: trains the head to propose drafts that main accepts.

A draft sampled from q is accepted with probability sum_v min(p(v), q(v)) = 1 - TV(p, q), where p is
main's distribution of the same token and TV the total variation distance. The stream is this
distance. Cross entropy and KL bound it only from above, and most loosely where p is spread out
(Bebop, arXiv 2606.12370).

p and q are those of the sampler: of the rollouts' temperature, top-k and top-p. No gradient flows
into p. Where q gives main's likely tokens next to no probability the gradient vanishes, so the head
should first be trained by `head_ce` or `head_kl`.
"""

from dataclasses import dataclass

from torch import Tensor

from ..batch import TextBatch
from .stream import SlotWeights, Stream, StreamInputs, Term, mean_by_slot


@dataclass(kw_only=True)
class HeadTV(SlotWeights, Stream):
    """Settings of the stream `head_tv`."""

    def counts(self, batch: TextBatch) -> dict[str, float | Tensor]:
        """Number of the head's tokens, weighted."""
        return {"head_tv": self.weight_sum(batch, "head_tv")}

    def terms(self, inputs: StreamInputs) -> dict[str, Term]:
        """Weighted sum of the distance over the head's tokens.

        Metrics: `head/acceptance`, the expected share of drafts that main accepts if it accepted
        the earlier ones of the block, and `head/acceptance_J` of slot J alone.
        """
        scored = inputs.scored
        accepted = scored.head.overlap(
            scored.flat_hidden.detach(),
            scored.main.output.detach(),
            inputs.batch.head.positions,
            inputs.sampler,
        )
        distance = (1 - accepted) * self.row_weights(inputs.batch, "head_tv")
        metrics = mean_by_slot("head/acceptance", accepted, inputs.batch)
        return {"head_tv": Term(distance.sum(), self.weight, metrics)}
