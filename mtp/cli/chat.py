"""A conversation on the screen: messages and commands, line by line, and the history of both."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..modeling.phases import MODES
from ..rollouts.prompt_format import PromptFormat

HELP = {
    "/mode fast|slow|verified": "decoding mode",
    "/k N": "head tokens per pass, at most N",
    "/save FILE": "write the conversation as JSON",
    "/new": "forget the conversation",
    "/help": "show the commands",
    "/quit": "end, as Ctrl-D does",
}
"""Commands of a conversation."""
LINES_KEPT = 1000
"""Lines of the history file."""


def history_file() -> Path:
    """File of the lines that were typed in earlier conversations."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "mtp" / "chat_history"


def typed_lines(console: Console) -> Iterator[str]:
    """Lines of standard input until its end. On a terminal they can be edited, and the arrow keys
    show the lines of earlier conversations.
    """
    on_terminal = console.is_terminal and sys.stdin.isatty()
    keep = remember(history_file()) if on_terminal else None
    try:
        while True:
            try:
                yield input("> " if console.is_terminal else "")
            except EOFError:
                if console.is_terminal:
                    console.print()
                return
    finally:
        if keep is not None:
            keep()


def remember(path: Path) -> Callable[[], None] | None:
    """Read the history of earlier conversations; returns a function that writes it.

    None where Python has no readline, or the file cannot be used: the conversation works without.
    """
    try:
        import readline

        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        readline.clear_history()
        readline.read_history_file(path)
    except (ImportError, OSError):
        return None
    readline.set_history_length(LINES_KEPT)

    def write() -> None:
        # A folder that has become read-only is no reason to fail at the end.
        with suppress(OSError):
            readline.write_history_file(path)

    return write


@dataclass
class Conversation:
    """A conversation with a model, and its settings."""

    console: Console
    fmt: PromptFormat
    """Makes prompts of conversations. Thoughts are left out of later prompts."""
    write: Callable[[list[int], str], list[int]]
    """Completes a prompt on the screen, (ids, mode) -> completion ids."""
    mode: str
    choose_mode: Callable[[str], str]
    """The mode that is asked for. Raises ValueError if the model cannot write in it."""
    check: Callable[[str], None]
    """Raises ValueError for a message that the model cannot read."""
    check_length: Callable[[list[int]], None]
    """Raises ValueError for a prompt that is too long for the model."""

    def __post_init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.texts: list[str] = []
        """Whole text of each answer, with its thought."""
        self.most = self.fmt.block_size - 1
        """Slots of the head."""

    def run(self, lines: Iterable[str]) -> None:
        """Follow the lines until one ends the conversation."""
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self.command(*line.partition(" ")[::2])
                elif line:
                    self.say(line)
            except (ValueError, OSError) as error:
                self.console.print(f"error: {error}", style="red", markup=False)

    def command(self, name: str, value: str) -> None:
        """Follow a command. Raises ValueError for a value that it cannot take."""
        value = value.strip()
        if name == "/new":
            self.messages, self.texts = [], []
        elif name == "/mode":
            if value not in MODES:
                raise ValueError(f"/mode must be one of {', '.join(MODES)}, got {value!r}")
            self.mode = self.choose_mode(value)
        elif name == "/k":
            if not (value.isascii() and value.isdigit() and int(value) <= self.most):
                raise ValueError(f"/k must be a number from 0 to {self.most}, got {value!r}")
            self.fmt.block_size = 1 + int(value)
        elif name == "/save":
            self.save(value)
        else:
            self.show_help()

    def show_help(self) -> None:
        """Print the commands."""
        width = max(map(len, HELP)) + 2
        for command, meaning in HELP.items():
            self.console.print(f"{command:<{width}}{meaning}", style="dim", markup=False)

    def say(self, line: str) -> None:
        """Answer a message. Raises ValueError for one that the model cannot read."""
        self.check(line)
        said = [*self.messages, {"role": "user", "content": line}]
        prompt = self.fmt.conversation_ids(said)
        try:
            self.check_length(prompt)
        except ValueError as error:
            raise ValueError(f"{error}, or type /new") from None
        ids = self.write(prompt, self.mode)
        answer = self.fmt.answer_text(ids)
        self.messages = [*said, {"role": "assistant", "content": answer or ""}]
        self.texts.append(str(self.fmt.tokenizer.decode(ids)))

    def save(self, name: str) -> None:
        """Write the messages as a JSON list; an answer has its whole text too.

        Raises ValueError for no name, or that of a file that exists.
        """
        if not name:
            raise ValueError("/save must have the name of a file; write /save FILE")
        texts = iter(self.texts)
        content = [
            message | ({"text": next(texts)} if message["role"] == "assistant" else {})
            for message in self.messages
        ]
        try:
            with Path(name).open("x", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise ValueError(f"{name} exists; give another name") from None
        self.console.print(f"saved {len(content)} messages to {name}", style="dim", markup=False)
