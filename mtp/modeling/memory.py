"""The memory file: a few named lines of text that the model edits with commands in its summaries.

    write KEY text     put `KEY: text` in the file, or in place of what KEY had
    delete KEY         take KEY out

One command a line, one word a key. A line that is no command, deletes what is not there or writes
more than there is room for changes nothing and is counted. What the model reads of the file, and
what is saved with a trajectory, is its plain text, `KEY: text` line by line.

Ships with checkpoints: imports nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

DONE = "done"
"""The key under which solved examples note the last step of a thought."""
ALPHABET = f"write delete {DONE}:\n"
"""Characters of commands and of the file, beside those of keys and texts."""


@dataclass(frozen=True)
class Memory:
    """A memory file at one moment. Editing makes another."""

    entries: Mapping[str, str] = field(default_factory=dict)
    """Text by key, in the order in which the keys were first written."""
    num_edits: int = 0
    """Commands that were followed."""
    num_ignored: int = 0
    """Lines of summaries that changed nothing: malformed, without effect or without room."""

    @property
    def text(self) -> str:
        """The file: `KEY: text` line by line."""
        return "\n".join(f"{key}: {text}" for key, text in self.entries.items())

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
            summary: anything that a model wrote.
            limit: a write after which `measure` of the file's text would be above it is ignored.
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
    """The entries after one command; None for a line that is none or has nothing to delete."""
    match line.split(maxsplit=2):
        case ["write", key, text] if key.rstrip(":"):
            return entries | {key.rstrip(":"): text}
        case ["delete", key] if key.rstrip(":") in entries:
            return {k: text for k, text in entries.items() if k != key.rstrip(":")}
    return None
