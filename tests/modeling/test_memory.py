"""The memory file: what commands do, what they cannot break, and that its text is all of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp.modeling.memory import ALPHABET, Memory

WORDS = st.sampled_from(["write", "delete", "a", "b:", "::", "c:d", "12+3=15", "Write", "é"])
LINES = st.lists(WORDS, max_size=5).map(" ".join)
SUMMARIES = st.lists(st.one_of(LINES, st.text(max_size=12)), max_size=8).map("\n".join)


def test_commands_by_hand():
    first = Memory().edited("write sum 37+85=122\nwrite todo: add 46\n", 99)
    assert first.text == "sum: 37+85=122\ntodo: add 46"
    second = first.edited("write sum 168\n  delete todo:  \nwrite answer is 168", 99)
    assert second.entries == {"sum": "168", "answer": "is 168"}
    assert (second.num_edits, second.num_ignored) == (5, 0)
    assert first.entries == {"sum": "37+85=122", "todo": "add 46"}, "editing makes another"


@pytest.mark.parametrize(
    "line",
    ["write", "write a", "write : b", "delete", "delete b", "delete a b", "erase a", "a: 2", "wri"],
)
def test_a_malformed_command_changes_nothing_and_is_counted(line):
    memory = Memory({"a": "1"})
    after = memory.edited(f"\n{line}\n\nwrite c 3\n", 99)
    assert after.entries == {"a": "1", "c": "3"}
    assert (after.num_edits, after.num_ignored) == (1, 1)


def test_a_write_without_room_is_ignored_and_a_delete_makes_room():
    memory = Memory().edited("write a 123456", 9)
    assert memory.text == "a: 123456"
    assert memory.edited("write b 1", 9).entries == {"a": "123456"}
    assert memory.edited("write a 1234567", 9).entries == {"a": "123456"}
    assert memory.edited("delete a\nwrite b 1", 9).entries == {"b": "1"}
    words = memory.edited("write b 1", 4, lambda text: len(text.split()))
    assert words.text == "a: 123456\nb: 1"


@given(summaries=st.lists(SUMMARIES, max_size=4), limit=st.integers(0, 60))
def test_any_text_leaves_a_readable_file_within_its_limit(summaries, limit):
    memory = Memory()
    for summary in summaries:
        before, memory = memory, memory.edited(summary, limit)
        num_lines = sum(bool(line.strip()) for line in summary.splitlines())
        counted = memory.num_edits + memory.num_ignored
        assert counted == before.num_edits + before.num_ignored + num_lines
        assert len(memory.text) <= limit
        assert Memory.read(memory.text).entries == memory.entries
        assert list(Memory.read(memory.text).entries) == list(memory.entries)


def test_a_file_that_is_none_is_refused():
    assert Memory.read("").entries == {}
    for text in ("a", "a:b", ": b", "a b: c", "a: "):
        with pytest.raises(ValueError, match="must be 'KEY: text'"):
            Memory.read(text)


def test_the_alphabet_is_what_commands_and_the_file_need_beside_keys_and_texts():
    written = "write delete" + Memory({"": ""}).text + Memory({"": "", "\n": ""}).text
    assert set(written) <= set(ALPHABET)
