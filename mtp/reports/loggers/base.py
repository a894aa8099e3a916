"""Sinks, which store a run's records. A run may have several, each with its own config.

A sink is a file with a dataclass of settings and a class that derives from `Sink`:

    register_sink("mine", MineConfig, MineSink)

A config then has it under `logger.sinks.mine`: write a `conf/logger/mine.yaml` like those of the
other sinks, or choose `logger=mine_schema`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ...common.bounds import bounded


@dataclass(kw_only=True)
class SinkConfig:
    """Settings of one sink."""

    def validate(self, key: str) -> None:
        """Raises ValueError for impossible values, naming them by the `key` of the settings."""


@dataclass(kw_only=True)
class LoggerConfig:
    """Settings of a run's log: interval and sinks."""

    log_every: int = bounded(10, at_least=1)
    """Number of steps between two records of training metrics."""
    sinks: dict[str, SinkConfig] = field(default_factory=lambda: {"files": SINKS["files"].config()})
    """Settings of each sink by its name, see `register_sink`. The files are always among them
    unless `~logger.sinks.files` removes them."""

    def validate(self) -> None:
        """Raises ValueError naming the key of an impossible value."""
        for name, config in self.sinks.items():
            kind = SINKS.get(name)
            if kind is None or not isinstance(config, kind.config):
                raise ValueError(
                    f"logger.sinks must be of {sorted(SINKS)}, got {name!r}; "
                    "choose them by logger=NAME or logger=[NAME,NAME]"
                )
            config.validate(f"logger.sinks.{name}")


@dataclass(frozen=True)
class LoggedRun:
    """The run that a sink is started for."""

    folder: Path
    """Folder of the run, where a sink may write."""
    settings: dict[str, Any]
    """Config of the run as plain values."""
    global_step: int
    """Optimizer steps done: 0 for a new run."""


class Sink:
    """A store of records. Methods that a sink does not need do nothing.

    `start` comes first and `finish` last. Only the first process has sinks.
    """

    writes: ClassVar[tuple[str, ...]] = ()
    """Files and folders that the sink makes in a run's folder; `overwrite=true` removes them."""

    def start(self, run: LoggedRun, state: dict[str, Any] | None) -> list[str]:
        """Begin, or continue from the `state` of a checkpoint: later records are removed.

        Returns lines for the console, such as a damaged file's loss.
        """
        return []

    def metrics(self, record: dict[str, Any]) -> None:
        """One record: `stage`, `step` in it, `global_step`, and numbers (or None) by name."""

    def table(self, name: str, rows: list[dict[str, Any]], global_step: int) -> None:
        """Rows of a table, such as the `completions` of an evaluation."""

    def artifact(self, path: Path) -> None:
        """A file or folder that the run has written: its curves, its export."""

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, with which a resumed run can continue the same log."""
        return {}

    def finish(self) -> None:
        """End the log; a process may run another one afterwards."""


@dataclass(frozen=True)
class SinkKind:
    """A registered sink."""

    config: type[SinkConfig]
    make: Callable[[Any], Sink]
    """(settings) -> sink."""
    writes: tuple[str, ...]


SINKS: dict[str, SinkKind] = {}
"""Registered sinks by name."""


def register_sink(name: str, config: type[SinkConfig], sink: type[Sink]) -> None:
    """Make a sink known to configs under `logger.sinks.<name>`. `sink` is called with its config.

    Raises ValueError if another sink has the name.
    """
    kind = SinkKind(config, sink, sink.writes)
    if SINKS.setdefault(name, kind) != kind:
        raise ValueError(f"a sink must have a name of its own, got {name!r}; choose another name")


class Log:
    """The sinks of a run, called one after the other; without sinks it does nothing."""

    def __init__(self, sinks: dict[str, Sink]):
        self._sinks = sinks

    @classmethod
    def of(cls, config: LoggerConfig) -> "Log":
        """The log of a run's config."""
        return cls({name: SINKS[name].make(one) for name, one in config.sinks.items()})

    def start(self, run: LoggedRun, states: dict[str, dict[str, Any]] | None) -> list[str]:
        """Start each sink, with its state in a checkpoint if it has one."""
        lines = []
        for name, sink in self._sinks.items():
            lines += sink.start(run, (states or {}).get(name))
        return lines

    def metrics(self, stage: str, step: int, global_step: int, values: dict[str, Any]) -> None:
        """One record, see `Sink.metrics`."""
        for sink in self._sinks.values():
            sink.metrics({"stage": stage, "step": step, "global_step": global_step, **values})

    def table(self, name: str, rows: list[dict[str, Any]], global_step: int) -> None:
        """Rows of a table, see `Sink.table`."""
        for sink in self._sinks.values():
            sink.table(name, rows, global_step)

    def artifact(self, path: Path) -> None:
        """A file or folder that the run has written."""
        for sink in self._sinks.values():
            sink.artifact(path)

    def states(self) -> dict[str, dict[str, Any]]:
        """State of each sink for a checkpoint, by its name."""
        return {name: sink.state() for name, sink in self._sinks.items()}

    def finish(self) -> None:
        """End all sinks; a second call does nothing."""
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.finish()
