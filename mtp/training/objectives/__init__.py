"""The objective: a weighted sum of per-token streams, each over its own global token count."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from ...common.registry import Registry
from ..batch import RolloutBatch, TextBatch
from .head_ce import HeadCE
from .head_kl import HeadKL
from .head_tv import HeadTV
from .main_ce import MainCE
from .policy import Policy
from .preserve import Preserve
from .reference_kl import ReferenceKL
from .scored import Scored, replay_batch
from .stream import ReferenceRows, Stream, StreamInputs, Term

__all__ = [
    "STREAMS",
    "ObjectiveConfig",
    "ReferenceRows",
    "Scored",
    "Stream",
    "StreamInputs",
    "Term",
    "replay_batch",
    "scores_head",
]

STREAMS: Registry[type[Stream]] = Registry()
"""Classes of the streams in `ObjectiveConfig.extra`; code outside the package adds them here."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Streams by name; a stream of weight 0 is not computed."""

    main_ce: MainCE = field(default_factory=MainCE)
    head_ce: HeadCE = field(default_factory=HeadCE)
    head_kl: HeadKL = field(default_factory=HeadKL)
    head_tv: HeadTV = field(default_factory=HeadTV)
    policy: Policy = field(default_factory=Policy)
    reference_kl: ReferenceKL = field(default_factory=ReferenceKL)
    preserve: Preserve = field(default_factory=Preserve)
    extra: dict[str, Any] = field(default_factory=dict)
    """Settings of streams that code outside the package has added to `STREAMS`, by name."""

    def all_streams(self) -> dict[str, Stream]:
        """All streams by name."""
        named = {name: stream for name, stream in vars(self).items() if name != "extra"}
        return named | {name: _outside_stream(name, given) for name, given in self.extra.items()}

    def active(self) -> dict[str, Stream]:
        """Streams with a weight above 0."""
        return {name: stream for name, stream in self.all_streams().items() if stream.weight}

    def validate(self, key: str) -> None:
        """Raises ValueError naming the key of an impossible value."""
        for name in self.extra:
            STREAMS.check(name, f"{key}.extra")
        for name, stream in self.all_streams().items():
            stream.validate(f"{key}.{name}")

    def streams(self, batch: TextBatch, in_rl: bool) -> dict[str, Stream]:
        """Active streams that read a batch.

        In an RL step (`in_rl`) solved examples are read by the streams that read `solved`, and
        rollouts by all others. A supervised step has one kind of batch, which all streams read.
        """
        is_solved = not isinstance(batch, RolloutBatch)
        return {
            name: stream
            for name, stream in self.active().items()
            if not in_rl or is_solved == (stream.reads == "solved")
        }

    @property
    def reads_solved(self) -> bool:
        """True if, in an RL stage, some stream reads solved examples."""
        return any(stream.reads == "solved" for stream in self.active().values())

    @property
    def uses_head(self) -> bool:
        """True if some stream scores the head's tokens."""
        return scores_head(self.active().values())

    @property
    def trains_head(self) -> bool:
        """True if some stream has a gradient for the head."""
        return any(stream.trains_head for stream in self.active().values())

    def reference_users(self) -> list[str]:
        """Active streams that compare with a frozen reference."""
        return [name for name, stream in self.active().items() if stream.needs_reference]

    def counts(self, batch: TextBatch, in_rl: bool = False) -> dict[str, float | Tensor]:
        """Tokens of every active stream that reads this micro-batch."""
        out: dict[str, float | Tensor] = {}
        for stream in self.streams(batch, in_rl).values():
            out |= stream.counts(batch)
        return out

    def terms(self, inputs: StreamInputs, in_rl: bool = False) -> dict[str, Term]:
        """Terms of all streams that read one micro-batch."""
        out: dict[str, Term] = {}
        for stream in self.streams(inputs.batch, in_rl).values():
            prefix = stream.metrics_prefix if in_rl else ""
            for name, term in stream.terms(inputs).items():
                metrics = {f"{prefix}{metric}": value for metric, value in term.metrics.items()}
                out[name] = replace(term, metrics=metrics)
        return out


def _outside_stream(name: str, settings: dict[str, Any]) -> Stream:
    """A stream of `extra`. Raises ValueError naming a key that it does not have."""
    cls = STREAMS.get(name, "objective.extra")
    for key in settings:
        if key not in {f.name for f in fields(cls)}:
            raise ValueError(f"unknown key objective.extra.{name}.{key}; {cls.__name__} has none")
    return cls(**settings)


def scores_head(streams: Iterable[Stream]) -> bool:
    """True if one of the streams scores the head's tokens."""
    return any(stream.scores_head for stream in streams)
