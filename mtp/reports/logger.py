"""Where numbers go: JSON lines and a CSV always, wandb when asked, and the progress bar."""

import csv
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bounds import bounded
from ..files import save_atomically, save_text

_log = logging.getLogger(__name__)


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
    log_every: int = bounded(10, at_least=1)
    """Steps between two records of training metrics."""


class JsonLines:
    """A file of one JSON object per line, which a resumed run can take back to an earlier state."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    @property
    def offset(self) -> int:
        """Bytes written so far."""
        self._file.flush()
        return self.path.stat().st_size if self.path.is_file() else 0

    def append(self, record: dict[str, Any]) -> None:
        """Write one record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def rewind(self, offset: int, global_step: int) -> str | None:
        """Forget the records after `offset` bytes, which a resumed run writes again.

        A damaged file keeps the records up to `global_step` that can be read. Returns a line that
        says what was lost, or None if nothing was.
        """
        self._file.close()
        content = self.path.read_bytes() if self.path.is_file() else b""
        records, num_unreadable = parse_records(content[:offset])
        message = None
        if len(content) >= offset and not num_unreadable:
            with self.path.open("ab") as file:
                file.truncate(offset)
        else:
            kept = [r for r in records if r.get("global_step", 0) <= global_step]
            save_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            missing = max(0, offset - len(content))
            message = (
                f"{self.path} is damaged: {len(kept)} records are kept, {num_unreadable} lines "
                f"could not be read and {missing} bytes are missing"
            )
        self._file = self.path.open("a", encoding="utf-8")
        return message

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MetricsLog:
    """`metrics.jsonl`: one object a record, with `stage`, `step` in the stage and `global_step`."""

    def __init__(self, folder: Path, config: LoggerConfig, run_config: dict[str, Any]):
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._completions = JsonLines(folder / "completions.jsonl")
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
    def offsets(self) -> dict[str, int]:
        """Bytes written to each file so far."""
        return {"metrics": self._metrics.offset, "completions": self._completions.offset}

    def rewind(self, offsets: dict[str, int], global_step: int) -> list[str]:
        """Forget what a resumed run writes again. Returns a line for each file that is damaged."""
        lost = (
            self._metrics.rewind(offsets["metrics"], global_step),
            self._completions.rewind(offsets["completions"], global_step),
        )
        return [message for message in lost if message is not None]

    def write(self, stage: str, step: int, global_step: int, values: dict[str, Any]) -> None:
        """One record."""
        record = {"stage": stage, "step": step, "global_step": global_step, **values}
        self._metrics.append(record)
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in record.items() if v is not None})

    def write_completions(self, rows: list[dict[str, Any]], global_step: int) -> None:
        """Sampled completions, into `completions.jsonl` and as a wandb table."""
        for row in rows:
            self._completions.append({"global_step": global_step, **row})
        if self._wandb is None or not rows:
            return
        import wandb

        data = [[json.dumps(v) if isinstance(v, list) else v for v in r.values()] for r in rows]
        table = wandb.Table(columns=list(rows[0]), data=data)
        self._wandb.log({"completions": table, "global_step": global_step})

    def save_csv(self) -> None:
        """Write metrics.csv, the table of all records so far."""
        path = self._metrics.path
        if path.is_file():
            records = read_records(path)
            save_atomically(path.with_suffix(".csv"), lambda file: _write_csv(file, records))

    def close(self) -> None:
        """Write the CSV and end the wandb run, so that a next run in this process gets its own."""
        self._metrics.close()
        self._completions.close()
        self.save_csv()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for record in records for name in record))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(records)


def parse_records(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records of JSON lines, and the number of lines that cannot be read."""
    records: list[dict[str, Any]] = []
    num_unreadable = 0
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # neither JSON nor UTF-8
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            num_unreadable += 1
    return records, num_unreadable


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. Lines that cannot be read are left out, with a warning."""
    records, num_unreadable = parse_records(path.read_bytes())
    if num_unreadable:
        _log.warning("%s: %d lines could not be read and are left out", path, num_unreadable)
    return records
