"""Progress bars of a stage and of an evaluation, and the console."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 30
"""Seconds between two lines of progress where there is no terminal."""
Report = Callable[[str, int, int], None]
"""Receives the name of a part of some work, how much of the part is done, and all of it."""


def no_report(part: str, done: int, total: int) -> None:
    """A `Report` that shows nothing."""


class StageProgress:
    """A progress bar on a terminal; elsewhere a line every half minute."""

    def __init__(
        self, stage: str, steps: int, done: int, console: Console, transient: bool = False
    ):
        """transient: remove the progress bar from the terminal at its end."""
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
                transient=transient,
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
        elif time.monotonic() - self._last > LINE_SECONDS or done == self.steps:
            self._last = time.monotonic()
            self.console.print(f"{self.stage} {done}/{self.steps}  {shown}")


class PartsProgress:
    """A `Report` for parts that come one after another: on a terminal a progress bar, which is
    removed with its part; elsewhere a line every half minute, so that short work leaves none.
    """

    def __init__(self, console: Console):
        self.console = console
        self._last = time.monotonic()
        self._part: str | None = None
        self._bar: StageProgress | None = None

    def __enter__(self) -> "PartsProgress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*exc)
            self._bar = None

    def __call__(self, part: str, done: int, total: int) -> None:
        """`done` of `total` of a part are finished."""
        if not self.console.is_terminal:
            if time.monotonic() - self._last > LINE_SECONDS:
                self._last = time.monotonic()
                self.console.print(f"{part} {done}/{total}")
            return
        if self._bar is None or part != self._part:
            self.__exit__()
            self._part = part
            self._bar = StageProgress(part, total, done, self.console, transient=True).__enter__()
        self._bar.step(done, {})


def make_console(quiet: bool = False) -> Console:
    """Standard output; without a line limit if it is not a terminal."""
    width = None if sys.stdout.isatty() else 120
    return Console(
        width=width, quiet=quiet, highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty()
    )
