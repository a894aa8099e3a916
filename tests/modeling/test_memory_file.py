"""A memory file that processes share: no edit is lost, and no reader sees half of one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import EOS, PAD, tiny_model

from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.memory import Memory
from mtp.modeling.memory_file import MemoryFile
from mtp.modeling.phases import PhasePlan
from mtp.modeling.records import pad
from mtp.modeling.segments import SegmentSettings, decode_segments

ROOT = Path(__file__).parents[2]
IMPORT = """
import importlib, os, sys, types
package = types.ModuleType("modeling")
package.__path__ = [sys.argv[1]]
sys.modules["modeling"] = package  # without torch, which takes seconds to import
Memory = importlib.import_module("modeling.memory").Memory
MemoryFile = importlib.import_module("modeling.memory_file").MemoryFile
file = MemoryFile(sys.argv[2])
"""


def start(path: Path, code: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", IMPORT + code, str(ROOT / "mtp/modeling"), str(path)]
    return subprocess.Popen([*command, *arguments])


def test_edits_of_several_processes_are_all_in_the_file(tmp_path):
    """Four processes write 20 keys each and one key together, while the file is read."""
    path = tmp_path / "project" / "memory"
    code = """
name, memory = sys.argv[3], Memory()
for number in range(20):
    text = f"write {name}{number} value {number} of {name}\\nwrite last {name}{number}"
    memory = file.edit(memory, text, 10**6)
    assert memory.entries[f"{name}{number}"] == f"value {number} of {name}"
assert (memory.num_edits, memory.num_ignored) == (40, 0)
"""
    processes = [start(path, code, name) for name in "abcd"]
    seen: set[str] = set()
    while any(process.poll() is None for process in processes):
        keys = set(MemoryFile(path).read().entries)  # complete at every moment
        assert seen <= keys
        seen = keys
    assert [process.returncode for process in processes] == [0] * 4
    entries = dict(MemoryFile(path).read().entries)
    assert entries.pop("last") in {f"{name}19" for name in "abcd"}
    assert entries == {f"{n}{i}": f"value {i} of {n}" for n in "abcd" for i in range(20)}


def test_the_file_stays_within_its_limit_and_keeps_every_accepted_line(tmp_path):
    """Three processes write lines of 10 characters, of which five fit with their line ends."""
    path = tmp_path / "memory"
    code = """
name, memory = sys.argv[3], Memory()
accepted = [i for i in range(9) if file.edit(memory, f"write {name}{i} {i}234567", 54).num_edits]
open(sys.argv[4], "w").write(" ".join(f"{name}{i}" for i in accepted))
"""
    names = "abc"
    processes = [start(path, code, name, str(tmp_path / name)) for name in names]
    assert [process.wait() for process in processes] == [0] * 3
    accepted = [key for name in names for key in (tmp_path / name).read_text().split()]
    entries = MemoryFile(path).read().entries
    assert sorted(entries) == sorted(accepted) and len(entries) == 4
    assert all(text == f"{key[1]}234567" for key, text in entries.items())
    assert len(MemoryFile(path).read().text) == 4 * len("a0: 0234567") + 3


def test_a_process_that_is_killed_within_an_edit_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "memory"
    MemoryFile(path).edit(Memory(), "write a 1", 100)
    code = """
import signal
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # the new file is complete by then
file.edit(Memory(), "write b 2", 100)
"""
    assert start(path, code).wait() == -signal.SIGKILL
    assert MemoryFile(path).read().entries == {"a": "1"}
    after = MemoryFile(path).edit(Memory(), "write c 3\ndelete b", 100)  # its lock is released
    assert after == Memory({"a": "1", "c": "3"}, num_edits=1, num_ignored=1)
    assert path.read_text() == "a: 1\nc: 3"


def test_a_damaged_file_is_refused_by_name(tmp_path):
    (tmp_path / "memory").write_text("a: 1\nnonsense")
    with pytest.raises(ValueError, match="memory_file .*memory: a line .* got 'nonsense'"):
        MemoryFile(tmp_path / "memory").edit(Memory(), "write b 2", 100)
    assert (tmp_path / "memory").read_text() == "a: 1\nnonsense"


def test_a_text_that_is_longer_than_the_limit_is_refused_before_any_pass(tmp_path, monkeypatch):
    (tmp_path / "memory").write_text("a: 123456")
    model, settings = tiny_model(), SegmentSettings(max_segments=3, memory_tokens=8)
    monkeypatch.setattr(type(model), "main_states", None)
    tokens, lengths = pad([[9, 6, THINK]], PAD)
    options = DecodeOptions(max_new_tokens=12, pad_id=PAD)
    given = {
        "memory_file .*memory": {"memory_file": MemoryFile(tmp_path / "memory")},
        "memories": {"memories": [Memory({"a": "123456"})]},
    }
    for name, memory in given.items():
        with pytest.raises(ValueError, match=f"{name} must hold at most memory_tokens=8 .*, got 9"):
            decode_segments(model, tokens, lengths, PLAN, options, settings, Commands(), **memory)


THINK, ANSWER, SUMMARY, CLOSE = 2, 3, 4, 5
PLAN = PhasePlan(
    keep=[1, 1, 1],
    opened_by=[THINK, SUMMARY, ANSWER],
    eos_ids=[EOS],
    max_tokens=[4, 3, None],
    closed_by=[None, CLOSE, None],
)


class Commands:
    """A tokenizer under which a summary of any tokens writes under a key of its own."""

    def decode(self, ids):
        return f"write k{sum(ids) % 7} v{len(ids)}"

    def encode(self, text, add_special_tokens):
        return [6 + ord(character) % 17 for character in text]


def test_trajectories_continue_from_the_file_that_all_of_them_edit(tmp_path):
    """Each context has the file as it was after the trajectory's own edit, or at the beginning."""
    model = tiny_model()
    prompts = [[9, 6, THINK], [8, THINK], [9, 10, 11, THINK], [7, THINK], [12, 13, THINK]]
    file, settings = (
        MemoryFile(tmp_path / "memory"),
        SegmentSettings(max_segments=3, recent_tokens=2, memory_tokens=200),
    )
    text, edits = "", 0
    for seed in (0, 1):
        tokens, lengths = pad(prompts, PAD)
        options = DecodeOptions(
            max_new_tokens=12, pad_id=PAD, generator=torch.Generator().manual_seed(seed)
        )
        out = decode_segments(
            model, tokens, lengths, PLAN, options, settings, Commands(), memory_file=file
        )
        for i, prompt in enumerate(prompts):
            first, *others = out.of(i)
            begun = [SUMMARY, *Commands().encode(text, False), CLOSE, THINK] if text else []
            assert out.prompts[first] == prompt + begun
            for before, segment in zip(out.of(i), others, strict=False):
                kept = Commands().encode(out.memories[before].text, False)
                start = [*prompt, SUMMARY, *kept, CLOSE, THINK]
                assert out.prompts[segment][: len(start)] == start
                edits += 1
        text = file.read().text
        assert text
        keys = {key for memory in out.memories for key in memory.entries}
        assert keys == set(file.read().entries)
    assert edits >= 4
