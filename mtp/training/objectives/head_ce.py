"""Cross entropy of the head's next K tokens: supervised warm-up of the head, or of the channel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.bounds import bounded
from ..batch import TextBatch
from .stream import StreamInputs, SupervisedStream, Term, mean_of, mean_where


@dataclass(kw_only=True)
class HeadCE(SupervisedStream):
    """Settings of the stream `head_ce`."""

    slot_weights: list[float] = bounded([], at_least=0)
    """Weights of slots 1..K; empty: equal weights. The sum is divided by the weights' sum."""

    def _weights(self, batch: TextBatch) -> Tensor:
        slots = batch.head.slots
        if not self.slot_weights:
            return torch.ones_like(slots, dtype=torch.float32)
        num_head_slots = batch.slot_inputs.shape[1]
        if len(self.slot_weights) != num_head_slots:
            raise ValueError(
                f"head_ce.slot_weights must have {num_head_slots} entries, one per head slot, got "
                f"{len(self.slot_weights)}; leave it empty for equal weights"
            )
        return torch.tensor(self.slot_weights, device=slots.device)[slots - 1]

    def counts(self, batch: TextBatch) -> dict[str, float | Tensor]:
        """Number of the head's tokens, weighted."""
        if not self.slot_weights:
            return {"head_ce": len(batch.head)}
        return {"head_ce": self._weights(batch).sum()}

    def terms(self, inputs: StreamInputs) -> dict[str, Term]:
        """Weighted sum of -log p over the head's tokens."""
        batch = inputs.batch
        out = inputs.scored.head.cross_entropy(self._weights(batch))
        correct = out.argmax == batch.head.targets
        metrics: dict[str, tuple[Tensor, int | Tensor]]
        metrics = {"head/accuracy": mean_of(correct), "head/entropy": mean_of(out.entropy)}
        for slot in range(1, batch.slot_inputs.shape[1] + 1):
            metrics[f"head/accuracy_{slot}"] = mean_where(correct, batch.head.slots == slot)
        return {"head_ce": Term(out.loss, self.weight, metrics)}
