"""The leash: KL of each emitter to a frozen reference LM over the flat text.

Main's distribution at each of its tokens, and the head's at each of its slots, against the
reference's next-token distribution at the same position of the flat text. The second is on-policy
self-distillation, and it is the one that keeps thoughts true: false tokens are mostly the head's.
"""

from dataclasses import dataclass

from torch import Tensor

from ..batch import TextBatch
from .scored import Scored
from .stream import Term, mean_of


@dataclass(kw_only=True)
class Leash:
    """`leash`"""

    weight: float = 0.0
    """Of main's tokens."""
    head_weight: float = 1.0
    """Of the head's tokens, times `weight`."""
    reverse: bool = True
    """True: KL(policy || reference), what RL's leash is. False: KL(reference || policy)."""

    def counts(self, batch: TextBatch) -> dict[str, float]:
        """Tokens of each emitter."""
        return {"leash_main": len(batch.main_rows), "leash_head": len(batch.head_rows)}

    def terms(
        self, scored: Scored, batch: TextBatch, reference_hidden: Tensor, reference_weight: Tensor
    ) -> dict[str, Term]:
        """Sum of the divergence over each emitter's tokens, in nats.

        reference_hidden: [B * T, D] rows of the frozen reference over the same text, without
        gradient; reference_weight: its output matrix [V, D].
        """
        terms = {}
        for name, emitter, rows, weight in (
            ("main", scored.main, batch.main_rows, self.weight),
            ("head", scored.head, batch.head_positions, self.weight * self.head_weight),
        ):
            kl = emitter.kl(reference_hidden, reference_weight, rows, reverse=self.reverse)
            terms[f"leash_{name}"] = Term(kl.sum(), weight, {f"{name}/kl": mean_of(kl.detach())})
        return terms
