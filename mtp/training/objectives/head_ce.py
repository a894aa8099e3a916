"""Cross entropy of the head's next K tokens: supervised warm-up of the head, or of the channel."""

from dataclasses import dataclass

from torch import Tensor

from ..batch import TextBatch
from .stream import SlotWeights, StreamInputs, SupervisedStream, Term, mean_by_slot, mean_of


@dataclass(kw_only=True)
class HeadCE(SlotWeights, SupervisedStream):
    """Settings of the stream `head_ce`."""

    def counts(self, batch: TextBatch) -> dict[str, float | Tensor]:
        """Number of the head's tokens, weighted."""
        return {"head_ce": self.weight_sum(batch, "head_ce")}

    def terms(self, inputs: StreamInputs) -> dict[str, Term]:
        """Weighted sum of -log p over the head's tokens."""
        batch = inputs.batch
        out = inputs.scored.head.cross_entropy(self.row_weights(batch, "head_ce"))
        correct = out.argmax == batch.head.targets
        metrics = mean_by_slot("head/accuracy", correct, batch)
        metrics["head/entropy"] = mean_of(out.entropy)
        return {"head_ce": Term(out.loss, self.weight, metrics)}
