"""Where numbers go: JSON lines and a CSV always, wandb when asked, and the progress bar."""

import csv
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@dataclass(kw_only=True)
class LoggerConfig:
    """Logging beside metrics.jsonl and metrics.csv, which are always written."""

    wandb: bool = False
    project: str = "mtp"
    entity: str | None = None
    mode: str = "offline"
    """wandb's mode: offline or online."""
    group: str | None = None
    """Of the wandb run; the jobs of a sweep share theirs."""
    tags: list[str] = field(default_factory=list)
    log_every: int = 10
    """Steps between two records of training metrics."""


class MetricsLog:
    """`metrics.jsonl`: one object a record, with `stage`, `step` in the stage and `global_step`."""

    def __init__(self, folder: Path, config: LoggerConfig, run_config: dict[str, Any]):
        self.path = folder / "metrics.jsonl"
        self.completions_path = folder / "completions.jsonl"
        self._file = self.path.open("a")
        self._wandb: Any = None
        self.run_id: str | None = None
        self._config, self._run_config, self._folder = config, run_config, folder

    def start_wandb(self, run_id: str | None) -> None:
        """Open the wandb run, or go on with the one of a resumed run."""
        if not self._config.wandb:
            return
        import wandb

        if self._config.mode not in ("offline", "online"):
            raise ValueError(f"logger.mode must be offline or online, got {self._config.mode!r}")
        self._wandb = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            mode=self._config.mode,  # type: ignore[arg-type]
            group=self._config.group,
            tags=self._config.tags,
            dir=str(self._folder),
            id=run_id,
            resume="allow" if run_id else None,
            config=self._run_config,
            name=self._folder.name,
        )
        self.run_id = self._wandb.id
        self._wandb.define_metric("global_step")
        self._wandb.define_metric("*", step_metric="global_step")

    @property
    def offset(self) -> int:
        """Bytes written so far."""
        self._file.flush()
        return self.path.stat().st_size

    def truncate(self, offset: int, global_step: int) -> None:
        """Forget what a resumed run will write again: all behind an offset, and behind a step."""
        self._file.flush()
        self._file.truncate(offset)
        if self.completions_path.is_file():
            rows = read_records(self.completions_path)
            kept = [json.dumps(row) + "\n" for row in rows if row["global_step"] <= global_step]
            self.completions_path.write_text("".join(kept))

    def write(self, stage: str, step: int, global_step: int, values: dict[str, Any]) -> None:
        """One record."""
        record = {"stage": stage, "step": step, "global_step": global_step, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in record.items() if v is not None})

    def write_completions(self, rows: list[dict[str, Any]], global_step: int) -> None:
        """Sampled completions, into `completions.jsonl` and as a wandb table."""
        with self.completions_path.open("a") as file:
            for row in rows:
                file.write(json.dumps({"global_step": global_step, **row}) + "\n")
        if self._wandb is None or not rows:
            return
        import wandb

        data = [[json.dumps(v) if isinstance(v, list) else v for v in r.values()] for r in rows]
        table = wandb.Table(columns=list(rows[0]), data=data)
        self._wandb.log({"completions": table, "global_step": global_step})

    def close(self) -> None:
        """Write the CSV and end the wandb run, so that a next run in this process gets its own."""
        self._file.close()
        records = read_records(self.path)
        names = list(dict.fromkeys(name for record in records for name in record))
        with self.path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(records)
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class StageProgress:
    """A progress bar on a terminal; elsewhere a line every half minute."""

    def __init__(self, stage: str, steps: int, done: int, console: Console):
        self.stage, self.steps, self.console = stage, steps, console
        self._last = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description:<6}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._task = self._bar.add_task(stage, total=steps, completed=done, figures="")

    def __enter__(self) -> "StageProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int, figures: dict[str, float | None]) -> None:
        """Show that `done` steps are behind, with some figures."""
        shown = "  ".join(f"{k} {v:.3g}" for k, v in figures.items() if v is not None)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=shown)
        elif time.monotonic() - self._last > 30 or done == self.steps:
            self._last = time.monotonic()
            self.console.print(f"{self.stage} {done}/{self.steps}  {shown}")


def make_console(quiet: bool = False) -> Console:
    """Standard output; as wide as it takes where it is not a terminal."""
    width = None if sys.stdout.isatty() else 120
    return Console(width=width, quiet=quiet, highlight=False, soft_wrap=not sys.stdout.isatty())
