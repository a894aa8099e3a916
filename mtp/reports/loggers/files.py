"""Records as files in the run's folder: metrics.jsonl, metrics.csv and a JSONL file a table."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.files import save_atomically
from ..json_lines import JsonLines, read_records
from .base import LoggedRun, Sink, SinkConfig

TABLES = ("completions", "thoughts", "outcomes", "rewards")
"""Tables that a run writes. All but the first are details; `rewards` has what reward functions
logged."""


@dataclass(kw_only=True)
class FilesConfig(SinkConfig):
    """Files in the run's folder; they have no settings."""


class FilesSink(Sink):
    """One line per record; the CSV is made of all records when the run ends or stops."""

    writes = ("metrics.jsonl", "metrics.csv", *(f"{name}.jsonl" for name in TABLES))

    def __init__(self, config: FilesConfig):
        self._files: dict[str, JsonLines] = {}

    def start(self, run: LoggedRun, state: dict[str, Any] | None) -> list[str]:
        """Open the files, without the records that a resumed run writes again."""
        names = ("metrics", *TABLES)
        self._files = {name: JsonLines(run.folder / f"{name}.jsonl") for name in names}
        if state is None:
            return []
        # Checkpoints of earlier versions know fewer files.
        lost = (
            file.rewind(state.get(name, 0), run.global_step) for name, file in self._files.items()
        )
        return [message for message in lost if message is not None]

    def metrics(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self._files["metrics"].append(record)

    def table(self, name: str, rows: list[dict[str, Any]], global_step: int) -> None:
        """One line per row."""
        for row in rows:
            self._files[name].append({"global_step": global_step, **row})

    def detail(self, name: str, rows: list[dict[str, Any]], global_step: int) -> None:
        """A line a row."""
        self.table(name, rows, global_step)

    def state(self) -> dict[str, Any]:
        """Bytes written to each file so far."""
        return {name: file.offset for name, file in self._files.items()}

    def finish(self, has_ended: bool) -> None:
        """Close the files and write metrics.csv."""
        for file in self._files.values():
            file.close()
        if "metrics" in self._files:
            save_csv(self._files["metrics"].path)


def save_csv(path: Path) -> None:
    """Write the records of a metrics.jsonl as a table next to it."""
    if path.is_file():
        records = read_records(path)
        save_atomically(path.with_suffix(".csv"), lambda file: _write_csv(file, records))


def _write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for record in records for name in record))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(records)
