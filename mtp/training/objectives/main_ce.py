"""Cross entropy of main's next token: the ordinary supervised stream."""

from dataclasses import dataclass

from ..batch import TextBatch
from .scored import Scored
from .stream import Term, mean_of


@dataclass(kw_only=True)
class MainCE:
    """`main_ce`"""

    weight: float = 0.0
    on_rollouts: bool = False
    """In an RL stage: score the policy's own rollouts. False: solved examples that are mixed into
    the step, `num_solved` of them."""

    def counts(self, batch: TextBatch) -> dict[str, float]:
        """Tokens of main."""
        return {"main_ce": len(batch.main)}

    def terms(self, scored: Scored, batch: TextBatch) -> dict[str, Term]:
        """Sum of -log p over main's tokens."""
        out = scored.main.cross_entropy()
        metrics = {
            "main/accuracy": mean_of(out.argmax == batch.main.targets),
            "main/entropy": mean_of(out.entropy),
        }
        return {"main_ce": Term(out.loss, self.weight, metrics)}
