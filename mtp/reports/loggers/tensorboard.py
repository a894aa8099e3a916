"""Records as TensorBoard's event files, below the run's `tensorboard/`.

`tensorboard --logdir runs` shows all runs side by side. The writer is torch's own; it imports the
package tensorboard when a run starts.

Left out: models, and the details that the report is made of.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from .base import LoggedRun, Sink, SinkConfig, scalars

FOLDER = "tensorboard"


@dataclass(kw_only=True)
class TensorBoardConfig(SinkConfig):
    """Event files; they have no settings."""

    needs: ClassVar[str | None] = "tensorboard"


class TensorBoardSink(Sink):
    """Scalars over `global_step`, completions and the config as text, pictures.

    A resumed run cuts the event files to the size that they had at its checkpoint.
    """

    writes = (FOLDER,)

    def __init__(self, config: TensorBoardConfig):
        self._writer: Any = None
        self._folder = Path()
        self._global_step = 0
        self._stage: str | None = None

    def start(self, run: LoggedRun, state: dict[str, Any] | None) -> list[str]:
        """Open a new event file, after those of earlier starts."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._global_step = run.folder / FOLDER, run.global_step
        lines = [] if state is None else cut(self._folder, state["files"])
        # A TensorBoard that has read later records drops them.
        purged = None if state is None else run.global_step + 1
        self._writer = SummaryWriter(str(self._folder), purge_step=purged)
        self._stage = None if state is None else state["stage"]
        if state is None:
            self._writer.add_text("config", code(yaml.safe_dump(run.settings, sort_keys=False)))
        return lines

    def metrics(self, record: dict[str, Any]) -> None:
        """A scalar per number; a new stage is a line of text."""
        self._global_step = record["global_step"]
        if record["stage"] != self._stage:
            self._stage = record["stage"]
            self._writer.add_text("stage", record["stage"], self._global_step)
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, self._global_step)

    def table(self, name: str, rows: list[dict[str, Any]], global_step: int) -> None:
        """Rows as text; the model's own text is a code block, which no browser runs."""
        if rows:
            self._writer.add_text(name, "\n\n".join(map(row_text, rows)), global_step)

    def artifact(self, path: Path) -> None:
        """A picture."""
        if path.suffix == ".png":
            from matplotlib.image import imread

            image = imread(path)
            self._writer.add_image(path.stem, image, self._global_step, dataformats="HWC")

    def state(self) -> dict[str, Any]:
        """Size of each event file, and the stage."""
        self._writer.flush()
        files = {path.name: path.stat().st_size for path in event_files(self._folder)}
        return {"files": files, "stage": self._stage}

    def finish(self, has_ended: bool) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


def event_files(folder: Path) -> list[Path]:
    """The event files of a folder, the oldest first."""
    return sorted(folder.glob("events.out.tfevents.*"))


def cut(folder: Path, sizes: dict[str, int]) -> list[str]:
    """Remove the records after a checkpoint, which a resumed run writes again.

    sizes: bytes of each event file at the checkpoint; other files are removed. Returns a line for
    each file that lacks some of its records.
    """
    found = {path.name: path for path in event_files(folder)}
    for name in found.keys() - sizes.keys():
        found[name].unlink()
    lines = []
    for name, size in sizes.items():
        left = found[name].stat().st_size if name in found else 0
        if left > size:
            os.truncate(found[name], size)
        elif left < size:
            lines.append(f"{folder / name} is damaged: {size - left} bytes are missing")
    return lines


def row_text(row: dict[str, Any]) -> str:
    """One row as Markdown: a cell with several words or lines is a code block."""
    parts = []
    for name, value in row.items():
        if isinstance(value, str):
            parts.append(f"**{name}**\n\n{code(value)}")
        elif value is not None:
            parts.append(f"**{name}** {value if not isinstance(value, list) else len(value)}")
    return "\n\n".join(parts)


def code(text: str) -> str:
    """Text as an indented code block of Markdown."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
