"""The objective: a weighted sum of per-token streams, each over its own global token count."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ...modeling.sampler import Sampler
from ..batch import RolloutBatch, TextBatch
from .head_ce import HeadCE
from .head_kl import HeadKL
from .leash import Leash
from .main_ce import MainCE
from .policy import Policy
from .preserve import Preserve
from .scored import Scored, replay_batch
from .stream import Term

__all__ = ["ObjectiveConfig", "Scored", "Term", "replay_batch", "scores_head"]

Stream = MainCE | HeadCE | HeadKL | Policy | Leash | Preserve


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Streams by name; a stream of weight 0 is not computed."""

    main_ce: MainCE = field(default_factory=MainCE)
    head_ce: HeadCE = field(default_factory=HeadCE)
    head_kl: HeadKL = field(default_factory=HeadKL)
    policy: Policy = field(default_factory=Policy)
    leash: Leash = field(default_factory=Leash)
    preserve: Preserve = field(default_factory=Preserve)

    def active(self) -> dict[str, Stream]:
        """Streams with a weight."""
        return {name: stream for name, stream in vars(self).items() if stream.weight}

    def streams(self, batch: TextBatch, in_rl: bool) -> dict[str, Stream]:
        """Active streams that read a batch.

        In an RL step (`in_rl`) solved examples are read by the two supervised streams, unless these
        are set `on_rollouts`, and rollouts by all others. A supervised step has one kind of batch.
        """
        if not in_rl:
            return self.active()
        is_solved = not isinstance(batch, RolloutBatch)
        return {
            name: stream
            for name, stream in self.active().items()
            if is_solved == (isinstance(stream, MainCE | HeadCE) and not stream.on_rollouts)
        }

    @property
    def reads_solved(self) -> bool:
        """True if, in an RL stage, some stream reads solved examples."""
        return any(s.weight and not s.on_rollouts for s in (self.main_ce, self.head_ce))

    @property
    def uses_head(self) -> bool:
        """True if some stream scores the head's tokens."""
        return scores_head(self.active())

    @property
    def uses_reference(self) -> bool:
        """True if some stream compares with a frozen reference."""
        return bool(self.active().keys() & {"leash", "preserve"})

    def counts(self, batch: TextBatch, in_rl: bool = False) -> dict[str, float]:
        """Tokens of every active stream in one micro-batch, of those that read it."""
        out: dict[str, float] = {}
        for stream in self.streams(batch, in_rl).values():
            if isinstance(stream, Policy):
                out |= stream.counts(rollouts_of(batch))
            else:
                out |= stream.counts(batch)
        return out

    def terms(
        self,
        scored: Scored,
        batch: TextBatch,
        sampler: Sampler,
        reference: tuple | None,
        in_rl: bool = False,
    ) -> dict[str, Term]:
        """Every stream that reads one micro-batch.

        reference: (hidden rows [B * T, D], output layer) of the frozen reference; the
        leash and the preservation read it.
        """
        out: dict[str, Term] = {}
        for name, stream in self.streams(batch, in_rl).items():
            if isinstance(stream, Policy):
                out |= stream.terms(scored, rollouts_of(batch), sampler)
            elif isinstance(stream, Leash | Preserve):
                if reference is None:
                    raise ValueError(f"objective.{name} needs a reference model, got none")
                hidden, output = reference
                out |= stream.terms(scored, batch, hidden, output, sampler)
            else:
                terms = stream.terms(scored, batch)
                if in_rl and isinstance(stream, MainCE | HeadCE):
                    terms = {k: replace(t, metrics=prefixed(t.metrics)) for k, t in terms.items()}
                out |= terms
        return out


def prefixed(metrics: dict) -> dict:
    """Metrics of a supervised stream in an RL step, told apart from those of the rollouts."""
    return {f"supervised/{name}": value for name, value in metrics.items()}


def scores_head(streams: Iterable[str]) -> bool:
    """True if one of the named streams scores the head's tokens."""
    return bool(set(streams) - {"main_ce", "preserve"})


def rollouts_of(batch: TextBatch) -> RolloutBatch:
    """The batch, which must be one of rollouts."""
    if not isinstance(batch, RolloutBatch):
        raise ValueError(
            "objective.policy needs rollouts: set the stage's kind to rl, got a supervised stage"
        )
    return batch
