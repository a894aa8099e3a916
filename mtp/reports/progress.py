"""The progress bar of a stage, and the console."""

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


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
                TextColumn("{task.fields[metrics]}"),
                console=console,
            )
            self._task = self._bar.add_task(stage, total=steps, completed=done, metrics="")

    def __enter__(self) -> "StageProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int, metrics: dict[str, float | None]) -> None:
        """Show that `done` steps are completed, with some metrics."""
        shown = "  ".join(f"{k} {v:.3g}" for k, v in metrics.items() if v is not None)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, metrics=shown)
        elif time.monotonic() - self._last > 30 or done == self.steps:
            self._last = time.monotonic()
            self.console.print(f"{self.stage} {done}/{self.steps}  {shown}")


def make_console(quiet: bool = False) -> Console:
    """Standard output; without a line limit if it is not a terminal."""
    width = None if sys.stdout.isatty() else 120
    return Console(width=width, quiet=quiet, highlight=False, soft_wrap=not sys.stdout.isatty())
