"""Files of one JSON object per line: written during a run, repaired when it is resumed."""

import json
import logging
from pathlib import Path
from typing import Any

from ..common.files import save_text

_log = logging.getLogger(__name__)


class JsonLines:
    """A file of one JSON object per line, which a resumed run can rewind to an earlier state."""

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
        """Remove the records after `offset` bytes, which a resumed run writes again.

        A damaged file keeps the records up to `global_step` that can be read. Returns a line that
        describes the loss, or None if there is none.
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


def with_plain_names(record: dict[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl with `eval/METRIC` for what an evaluation within a stage has as
    `eval/SET/METRIC`, because its task sets problems apart for it (`Task.interim_set`).

    The record of a stage's end is returned as it is.
    """
    parts = {name: name.split("/", 2) for name in record if name.startswith("eval/")}
    if any(len(path) == 2 for path in parts.values()):
        return record
    return record | {f"eval/{path[2]}": record[name] for name, path in parts.items()}
