"""The memory file: a few named lines of text that the model edits with commands in its summaries.

    write KEY text     add the line `KEY: text`, or replace the line of KEY
    delete KEY         remove the line of KEY

There is one command per line, and a key is one word. A line is ignored and counted if it is no
command, deletes a missing key, or writes more than there is room for. The model reads the file as
plain text, `KEY: text` line by line; the same text is saved with a trajectory.

Ships with checkpoints: imports nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

DONE = "done"
"""The key under which solved examples note the last step of a thought. Its line is dropped where
a memory passes to the next problem of a project."""
ALPHABET = f"write delete {DONE}:\n"
"""Characters of commands and of the file, in addition to those of keys and texts."""


@dataclass(frozen=True)
class Memory:
    """A memory file at one moment. Editing makes another."""

    entries: Mapping[str, str] = field(default_factory=dict)
    """Text by key, in the order in which the keys were first written."""
    num_edits: int = 0
    """Number of commands that changed the file."""
    num_ignored: int = 0
    """Number of summary lines that changed nothing: malformed, without effect or without room."""

    @property
    def text(self) -> str:
        """Text of the file: `KEY: text` line by line."""
        return "\n".join(f"{key}: {text}" for key, text in self.entries.items())

    def passed_on(self) -> "Memory":
        """The memory in which the next problem of a project begins.

        The line of DONE is progress within one problem, so the next one does not read it. Counts
        begin at 0.
        """
        return Memory({key: text for key, text in self.entries.items() if key != DONE})

    @classmethod
    def read(cls, text: str) -> "Memory":
        """The memory whose `text` this is. Raises ValueError for a line that is not `KEY: text`."""
        entries = {}
        for line in text.splitlines():
            key, colon, value = line.partition(": ")
            if not colon or not value.strip() or key.split() != [key]:
                raise ValueError(f"a line of a memory file must be 'KEY: text', got {line!r}")
            entries[key] = value
        return cls(entries)

    def edited(self, summary: str, limit: int, measure: Callable[[str], int] = len) -> "Memory":
        """The memory after the commands of a summary, in their order.

        Args:
            summary: text that a model wrote, in any form.
            limit: maximum `measure` of the file's text; a write that exceeds it is ignored.
            measure: size of a text; by default its characters.
        """
        entries, num_edits, num_ignored = dict(self.entries), 0, 0
        for line in filter(None, map(str.strip, summary.splitlines())):
            changed = _followed(entries, line)
            grew = changed is not None and len(changed) >= len(entries)
            if changed is None or (grew and measure(Memory(changed).text) > limit):
                num_ignored += 1
            else:
                entries, num_edits = changed, num_edits + 1
        return Memory(entries, self.num_edits + num_edits, self.num_ignored + num_ignored)


def _followed(entries: dict[str, str], line: str) -> dict[str, str] | None:
    """The entries after one command; None for no command or for deleting a missing key."""
    match line.split(maxsplit=2):
        case ["write", key, text] if key.rstrip(":"):
            return entries | {key.rstrip(":"): text}
        case ["delete", key] if key.rstrip(":") in entries:
            return {k: text for k, text in entries.items() if k != key.rstrip(":")}
    return None
