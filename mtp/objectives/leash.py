"""The leash: KL of each emitter to a frozen reference LM over the flat text.

Main's distribution at each of its tokens, and the head's at each of its slots, against the
reference's next-token distribution at the same position of the flat text. The second is on-policy
self-distillation, and it is the one that keeps thoughts true: false tokens are mostly the head's.
"""

from dataclasses import dataclass

from torch import Tensor

from ..batch import RolloutBatch, TextBatch
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
    everywhere: bool = False
    """On rollouts: hold main at every position, also where the head wrote the token, and the head
    at every position at which a pass could have begun, not only where they acted. Slow mode, which
    reads main at all positions, is held too, and the head learns from k + 1 times the rows."""

    def counts(self, batch: TextBatch) -> dict[str, float]:
        """Tokens of each emitter."""
        if self.everywhere and isinstance(batch, RolloutBatch):
            main, head = len(batch.every_main_rows), len(batch.every_head_rows)
            return {"leash_main": main, "leash_head": head}
        return {"leash_main": len(batch.main_rows), "leash_head": len(batch.head_rows)}

    def terms(
        self, scored: Scored, batch: TextBatch, reference_hidden: Tensor, reference_weight: Tensor
    ) -> dict[str, Term]:
        """Sum of the divergence over each emitter's tokens, in nats.

        reference_hidden: [B * T, D] rows of the frozen reference over the same text, without
        gradient; reference_weight: its output matrix [V, D].
        """
        main, head = scored.main, scored.head
        main_rows, head_rows = batch.main_rows, batch.head_positions
        if self.everywhere and isinstance(batch, RolloutBatch):
            main, head = scored.everywhere(batch)
            main_rows, head_rows = batch.every_main_rows, batch.every_head_positions
        terms = {}
        for name, emitter, rows, weight in (
            ("main", main, main_rows, self.weight),
            ("head", head, head_rows, self.weight * self.head_weight),
        ):
            kl = emitter.kl(reference_hidden, reference_weight, rows, reverse=self.reverse)
            terms[f"leash_{name}"] = Term(kl.sum(), weight, {f"{name}/kl": mean_of(kl.detach())})
        return terms
