"""The objective: a weighted sum of per-token streams, each over its own global token count."""

from dataclasses import dataclass, field

from ..batch import RolloutBatch, TextBatch
from ..generation_mtp import Sampler
from .head_ce import HeadCE
from .head_kl import HeadKL
from .leash import Leash
from .main_ce import MainCE
from .policy import Policy
from .preserve import Preserve
from .scored import Scored, score_batch
from .stream import Term

__all__ = ["ObjectiveConfig", "Scored", "Term", "score_batch"]


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Streams by name; a stream of weight 0 is not computed."""

    main_ce: MainCE = field(default_factory=MainCE)
    head_ce: HeadCE = field(default_factory=HeadCE)
    head_kl: HeadKL = field(default_factory=HeadKL)
    policy: Policy = field(default_factory=Policy)
    leash: Leash = field(default_factory=Leash)
    preserve: Preserve = field(default_factory=Preserve)

    def active(self) -> dict[str, MainCE | HeadCE | HeadKL | Policy | Leash | Preserve]:
        """Streams with a weight."""
        return {name: stream for name, stream in vars(self).items() if stream.weight}

    @property
    def uses_head(self) -> bool:
        """True if some stream scores the head's tokens."""
        return bool(self.active().keys() - {"main_ce", "preserve"})

    @property
    def uses_reference(self) -> bool:
        """True if some stream compares with a frozen reference."""
        return bool(self.active().keys() & {"leash", "preserve"})

    def counts(self, batch: TextBatch) -> dict[str, float]:
        """Tokens of every active stream in one micro-batch."""
        out: dict[str, float] = {}
        for stream in self.active().values():
            out |= stream.counts(batch)
        return out

    def terms(
        self,
        scored: Scored,
        batch: TextBatch,
        sampler: Sampler,
        reference: tuple | None,
    ) -> dict[str, Term]:
        """Every active stream over one micro-batch.

        reference: (hidden rows [B * T, D], output matrix [V, D]) of the frozen reference; the
        leash and the preservation read it.
        """
        out: dict[str, Term] = {}
        for name, stream in self.active().items():
            if isinstance(stream, Policy):
                if not isinstance(batch, RolloutBatch):
                    raise ValueError(
                        "objective.policy needs rollouts: set the stage's kind to rl, got a "
                        "supervised stage"
                    )
                out |= stream.terms(scored, batch, sampler)
            elif isinstance(stream, Leash | Preserve):
                if reference is None:
                    raise ValueError(f"objective.{name} needs a reference model, got none")
                out |= stream.terms(scored, batch, *reference)
            else:
                out |= stream.terms(scored, batch)
        return out
