"""A conversation: what the model is asked, its commands, and the history of the lines typed."""

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from rich.console import Console

from mtp.cli.chat import Conversation, history_file
from mtp.modeling.phases import Phase
from mtp.rollouts.new_tokenizers import character_tokenizer
from mtp.rollouts.prompt_format import PromptFormat

PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>"),
    "answer": Phase(mode="slow", opened_by="</think>"),
}


class Model:
    """Writes the thought `1;` and the number of the question, and records what it was asked."""

    def __init__(self):
        alphabet = character_tokenizer("0123456789+=;", ["<think>", "</think>"])
        self.fmt = PromptFormat(alphabet, PHASES, 4)
        self.asked: list[tuple[str, str, int]] = []
        self.console = Console(file=io.StringIO(), width=200)

    def write(self, prompt: list[int], mode: str) -> list[int]:
        keep = self.fmt.plan(mode).keep[0]
        self.asked.append((str(self.fmt.tokenizer.decode(prompt)), mode, keep))
        return self.fmt.completion_ids("1;", str(len(self.asked)))

    def choose_mode(self, mode: str) -> str:
        if mode == "verified":
            raise ValueError("the head is untrained")
        return mode

    def check(self, message: str) -> None:
        if "x" in message:
            raise ValueError("no x")

    def check_length(self, prompt: list[int]) -> None:
        if len(prompt) > 9:
            raise ValueError("too long")

    def talk(self, *lines: str) -> str:
        given = Conversation(
            console=self.console,
            fmt=self.fmt,
            write=self.write,
            mode="fast",
            choose_mode=self.choose_mode,
            check=self.check,
            check_length=self.check_length,
        )
        given.run(lines)
        return self.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_conversation_continues_until_it_is_quit():
    model = Model()
    lines = ["1+", "", "2+x", "3+", "/mode slow", "4+", "5+", "/new", "5+", "/quit", "6+"]
    shown = model.talk(*lines)
    assert model.asked == [
        ("1+<think>", "fast", 4),
        ("1+13+<think>", "fast", 4),
        ("1+13+24+<think>", "slow", 1),
        ("5+<think>", "slow", 1),
    ]
    assert shown == "error: no x\nerror: too long, or type /new\n"


def test_a_mode_that_the_model_does_not_have_is_refused():
    model = Model()
    assert model.talk("/mode verified", "1+") == "error: the head is untrained\n"
    assert [mode for _, mode, _ in model.asked] == ["fast"]


def test_k_sets_the_tokens_of_the_head_per_pass():
    model = Model()
    shown = model.talk("/k 1", "1+", "/k 0", "/new", "2+", "/k 3", "/new", "3+", "/k 4", "/k x")
    assert [keep for _, _, keep in model.asked] == [2, 1, 4]
    assert shown.splitlines() == [
        "error: /k must be a number from 0 to 3, got '4'",
        "error: /k must be a number from 0 to 3, got 'x'",
    ]


def test_save_writes_messages_with_their_thoughts_and_replaces_nothing(tmp_path):
    model, path = Model(), tmp_path / "talk.json"
    shown = model.talk("1+", f"/save {path}", "2+", f"/save {path}", "/save")
    assert json.loads(path.read_text()) == [
        {"role": "user", "content": "1+"},
        {"role": "assistant", "content": "1", "text": "1;</think>1<eos>"},
    ]
    assert "saved 2 messages" in shown and "exists; give another name" in shown
    assert "error: /save must have the name of a file" in shown


@pytest.mark.parametrize("line", ["/help", "/wat"])
def test_help_names_every_command(line):
    shown = Model().talk(line)
    for command in ("/mode fast|slow|verified", "/k N", "/save FILE", "/new", "/help", "/quit"):
        assert f"\n{command} " in f"\n{shown}"


def test_an_unknown_mode_is_refused():
    shown = Model().talk("/mode warp")
    assert shown == "error: /mode must be one of fast, slow, verified, got 'warp'\n"


SCRIPT = """
from rich.console import Console
from mtp.cli.chat import typed_lines
for line in typed_lines(Console(force_terminal=True)):
    print("got", repr(line), flush=True)
"""


def type_lines(state: Path, keys: bytes) -> str:
    """Text that a terminal shows while keys are typed into a conversation."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm"}
    job = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=theirs, stdout=theirs, stderr=theirs,
        env=environment, cwd=ROOT, close_fds=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while b"> " not in shown:
        shown += os.read(ours, 4096)
    os.write(ours, keys)
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert job.wait() == 0
    return shown.decode()


def test_the_arrow_key_brings_back_a_line_of_an_earlier_conversation(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    shown = type_lines(tmp_path, b"12+34=\r\x04")
    assert "got '12+34='" in shown
    assert history_file().read_text() == "12+34=\n"
    shown = type_lines(tmp_path, b"\x1b[A\r\x04")
    assert "got '12+34='" in shown
    assert history_file() == tmp_path / "mtp" / "chat_history"


def test_a_history_that_cannot_be_kept_is_no_error(tmp_path):
    (tmp_path / "mtp").write_text("a file where the folder should be")
    assert "got '1+'" in type_lines(tmp_path, b"1+\r\x04")
