"""The lock file of a run's folder, as another process reads it. It imports nothing heavy."""

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

LOCK = ".mtp-lock"
"""File that the process that writes a run holds locked and removes when it ends."""


@dataclass(frozen=True)
class Writer:
    """The process that wrote a lock file."""

    process: int
    host: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def is_here(self) -> bool:
        """True if it is, or was, on this machine."""
        return self.host == socket.gethostname()


def this_process() -> Writer:
    """The writer that this process is."""
    return Writer(os.getpid(), socket.gethostname())


def writer_of(folder: Path) -> Writer | None:
    """The process that writes into a run's folder; None if there is none.

    A process that was killed leaves its file. It is recognised on its own machine only: on another
    one it counts as a writer. The lock itself is not tried, since that could stop a run that begins
    at the same moment.
    """
    try:
        text = (folder / LOCK).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = re.fullmatch(r"process (\d+) on (.+)", text.strip())
    if found is None:
        return None
    writer = Writer(int(found[1]), found[2])
    return writer if not writer.is_here or is_alive(writer.process) else None


def is_alive(process: int) -> bool:
    """True if a process of this machine, of any user, has not ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
