"""Sinks, which store a run's records. A run may have several, each with its own config.

A sink is a file with a dataclass of settings and a class that derives from `Sink`:

    register_sink("mine", MineConfig, MineSink)

A config then has it under `logger.sinks.mine`: write a `conf/logger/mine.yaml` like those of the
other sinks, or choose `logger=mine_schema`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from ...common.bounds import bounded


@dataclass(kw_only=True)
class SinkConfig:
    """Settings of one sink."""

    needs: ClassVar[str | None] = None
    """Package that the sink imports and that mtp itself does not need; the extra of mtp has the
    name of the sink."""

    def validate(self, key: str) -> None:
        """Raises ValueError for impossible values, naming them by the `key` of the settings."""


@dataclass(kw_only=True)
class LoggerConfig:
    """Settings of a run's log: interval and sinks."""

    log_every: int = bounded(10, at_least=1)
    """Number of steps between two records of training metrics."""
    thought_tokens: int = bounded(32768, at_least=0, at_most=100_000_000)
    """Tokens of the rollouts that `thoughts.jsonl` keeps of the evaluation that ends a stage, for
    the report (about 150 bytes per token). An evaluation within a stage keeps an eighth. 0: none.
    """
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

    def check_installed(self) -> None:
        """Raises ValueError naming the extra of the first sink whose package is missing.

        No part of `validate`: a run's model opens where its sinks are not installed.
        """
        for name, config in self.sinks.items():
            if config.needs is not None and find_spec(config.needs) is None:
                raise ValueError(
                    f"logger={name} needs the package {config.needs}; install it with: "
                    f"pip install '.[{name}]' in a checkout, pip install 'mtp-eavesdrop[{name}]' "
                    "elsewhere"
                )


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
    stores_report: ClassVar[bool] = False
    """True for a sink that keeps the report page: it is written when the run ends, and is then an
    `artifact`."""

    def start(self, run: LoggedRun, state: dict[str, Any] | None) -> list[str]:
        """Begin, or continue from the `state` of a checkpoint: later records are removed.

        Returns lines for the console, such as a damaged file's loss.
        """
        return []

    def metrics(self, record: dict[str, Any]) -> None:
        """One record: `stage`, `step` in it, `global_step`, and numbers (or None) by name."""

    def table(self, name: str, rows: list[dict[str, Any]], global_step: int) -> None:
        """Rows of a table, such as the `completions` of an evaluation."""

    def detail(self, name: str, rows: list[dict[str, Any]], global_step: int) -> None:
        """Rows that the report is made of, such as `thoughts`. Their cells may hold long lists."""

    def artifact(self, path: Path) -> None:
        """A file or folder that the run has written: its curves, its export."""

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, with which a resumed run can continue the same log."""
        return {}

    def finish(self, has_ended: bool) -> None:
        """End the log; a process may run another one afterwards.

        has_ended: False if the run was stopped or failed; it may be resumed.
        """


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
        """Start each sink, with its state in a checkpoint if it has one.

        The files come last: a sink that cannot be reached fails before their later rows go.
        """
        lines = []
        for name in sorted(self._sinks, key=lambda name: name == "files"):
            lines += self._sinks[name].start(run, (states or {}).get(name))
        return lines

    def metrics(self, stage: str, step: int, global_step: int, values: dict[str, Any]) -> None:
        """One record, see `Sink.metrics`."""
        for sink in self._sinks.values():
            sink.metrics({"stage": stage, "step": step, "global_step": global_step, **values})

    def table(self, name: str, rows: list[dict[str, Any]], global_step: int) -> None:
        """Rows of a table, see `Sink.table`."""
        for sink in self._sinks.values():
            sink.table(name, rows, global_step)

    def detail(self, name: str, rows: list[dict[str, Any]], global_step: int) -> None:
        """Rows that the report is made of, see `Sink.detail`."""
        for sink in self._sinks.values():
            sink.detail(name, rows, global_step)

    def artifact(self, path: Path) -> None:
        """A file or folder that the run has written."""
        for sink in self._sinks.values():
            sink.artifact(path)

    def states(self) -> dict[str, dict[str, Any]]:
        """State of each sink for a checkpoint, by its name."""
        return {name: sink.state() for name, sink in self._sinks.items()}

    @property
    def stores_report(self) -> bool:
        """True if a sink keeps the report page, and the files that it is made of are written."""
        return "files" in self._sinks and any(s.stores_report for s in self._sinks.values())

    def finish(self, has_ended: bool) -> None:
        """End all sinks, see `Sink.finish`; a second call does nothing."""
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.finish(has_ended)


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by name, for stores that hold one number per name and step.

    `stage`, `step` and `global_step` are left out, and so are None, NaN and infinity. A list has a
    number per entry: `eval/acceptance_by_slot/1` is that of slot 1.
    """
    found: dict[str, float] = {}
    for name, value in record.items():
        if name in ("stage", "step", "global_step"):
            continue
        if isinstance(value, list):
            entries = {f"{name}/{place}": entry for place, entry in enumerate(value, 1)}
        else:
            entries = {name: value}
        for key, entry in entries.items():
            if isinstance(entry, int | float) and math.isfinite(entry):
                found[key] = float(entry)
    return found
