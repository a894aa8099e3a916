"""Cross entropy of main's next token: the ordinary supervised stream."""

from dataclasses import dataclass
from typing import ClassVar

from ..batch import TextBatch
from .stream import StreamInputs, SupervisedStream, Term, mean_of


@dataclass(kw_only=True)
class MainCE(SupervisedStream):
    """Settings of the stream `main_ce`."""

    scores_head: ClassVar[bool] = False

    def counts(self, batch: TextBatch) -> dict[str, float]:
        """Number of main's tokens."""
        return {"main_ce": len(batch.main)}

    def terms(self, inputs: StreamInputs) -> dict[str, Term]:
        """Sum of -log p over main's tokens."""
        out = inputs.scored.main.cross_entropy()
        metrics = {
            "main/accuracy": mean_of(out.argmax == inputs.batch.main.targets),
            "main/entropy": mean_of(out.entropy),
        }
        return {"main_ce": Term(out.loss, self.weight, metrics)}
