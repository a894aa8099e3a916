"""A memory file on disk that several trajectories, and processes, read and edit.

Its text is that of `Memory`: `KEY: text` line by line. An edit takes a lock, reads the file as it
is, applies a summary's commands and moves a complete new file into place. So edits follow each
other: no line is lost that another trajectory has written under another key, and of two texts for
one key the later one is kept. A process that ends at any moment leaves the file before or after its
edit, and the system releases its lock. Reading takes no lock.

The lock is `flock` on a file beside it, which some network filesystems do not have.

Ships with checkpoints: imports siblings only.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .memory import Memory


class MemoryFile:
    """The file at a path; it need not exist before the first edit."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def read(self) -> Memory:
        """The memory as it is now. Raises ValueError naming the file and a line that is damaged."""
        try:
            return Memory.read(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Memory()
        except ValueError as error:
            raise ValueError(f"memory_file {self.path}: {error}; correct or remove it") from None

    def edit(
        self, before: Memory, summary: str, limit: int, measure: Callable[[str], int] = len
    ) -> Memory:
        """The file after the commands of a summary, as in `Memory.edited`.

        before: the trajectory's memory, of which only the numbers of edits count.
        """
        with self._locked():
            after = replace(before, entries=self.read().entries).edited(summary, limit, measure)
            if after.num_edits > before.num_edits:
                self._write(after.text)
        return after

    def _write(self, text: str) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl  # here, since other systems lack it and most checkpoints share no file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            yield
