"""The jobs of a sweep while it runs: state, step, last metrics. Reads the jobs' folders only.

A job that has not started has no folder; `mtp sweep status` adds it from the sweep's command.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..common.lock import writer_of
from .json_lines import parse_records, with_plain_names
from .metrics import METRICS
from .sweep import Job, read_jobs

SHOWN = ("slow_accuracy", "fast_accuracy", "accuracy")
"""Metrics of the last evaluation that the table shows, as far as some job has them."""


@dataclass(kw_only=True)
class Status:
    """A job as its folder describes it now."""

    folder: str
    """Name within the sweep's folder."""
    overrides: dict[str, str]
    state: str
    """`done`, `failed`, `running`, `stopped` (it has records, and no process writes it), `waiting`
    (its folder exists, but it has not begun) or `not started` (it has no folder)."""
    stage: str | None = None
    """Stage of its last record."""
    step: int = 0
    """Optimizer steps that its last record counts, over all stages."""
    steps: int | None = None
    """Steps of all stages. A job that ends a stage early takes fewer."""
    metrics: dict[str, float]
    """Last value of each metric of `SHOWN`."""
    age: float | None = None
    """Seconds since its last record."""
    writer: str | None = None
    """Process that writes it."""
    error: str | None = None
    """First line of its error, if it failed."""


def read_status(folder: Path) -> list[Status]:
    """The jobs of a sweep that have a folder, sorted as `read_jobs` does.

    Raises ValueError if there are none.
    """
    return [_status(folder / job.folder, job) for job in read_jobs(folder)]


def _status(path: Path, job: Job) -> Status:
    log, now = path / "metrics.jsonl", time.time()
    found = parse_records(log.read_bytes())[0] if log.is_file() else []
    records = list(map(with_plain_names, found))
    writer = writer_of(path)
    state = job.status
    if writer is not None:
        state = "running"
    elif state == "unfinished":
        state = "stopped" if (path / "config.yaml").is_file() else "waiting"
    last: dict[str, Any] = records[-1] if records else {}
    shown = {
        name: record[key]
        for record in records
        for name, key in ((name, f"eval/{name}") for name in SHOWN)
        if record.get(key) is not None
    }
    return Status(
        folder=job.folder,
        overrides=job.swept,
        state=state,
        stage=last.get("stage"),
        step=last.get("global_step", 0),
        steps=_steps(path / "config.yaml"),
        metrics=shown,
        age=now - log.stat().st_mtime if records else None,
        writer=None if writer is None else str(writer),
        error=job.error if state == "failed" else None,
    )


def _steps(config: Path) -> int | None:
    """Steps of all stages of a run; None if its config cannot be read."""
    try:
        stages = yaml.safe_load(config.read_text(encoding="utf-8"))["stages"]
        return sum(int(stage["steps"]) for stage in stages.values())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None


def print_status(console: Console, folder: Path, jobs: list[Status]) -> None:
    """A row per job, then the errors of those that failed."""
    states = [job.state for job in jobs]
    count = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    table = Table(title=f"{folder}: {count}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # In a narrow terminal long names are folded, and no number is cut.
    table.add_column("job", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("stage", overflow="fold")
    table.add_column("step", overflow="fold")
    names = [name for name in SHOWN if any(name in job.metrics for job in jobs)]
    for name in names:
        table.add_column(METRICS[name].narrow_head, justify="right", no_wrap=True)
    table.add_column("last\nrecord", justify="right", overflow="fold")
    for job in jobs:
        cells = [METRICS[name].cell(job.metrics.get(name)) for name in names]
        step = f"{job.step}" if job.steps is None else f"{job.step} of {job.steps}"
        age = "-" if job.age is None else ago(job.age)
        table.add_row(escape(job.folder), job.state, escape(job.stage or "-"), step, *cells, age)
    console.print(table)
    for job in jobs:
        if job.error is not None:
            console.print(f"failed: {escape(job.folder)}: {escape(job.error)}")
        if job.state == "running":
            console.print(f"running: {escape(job.folder)}: {job.writer}")


def ago(seconds: float) -> str:
    """An age in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"
