"""Stretches of text: their bounds, their splits, and what a run says of a task without answers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp.tasks.base import check_disjoint
from mtp.tasks.continuation import ContinuationConfig, begin, cut, texts

TASK = ContinuationConfig().build()


def test_texts_are_cut_at_white_space():
    text = "one two  three"
    assert [text[: cut(text, 0, size)] for size in (3, 5, 6, 8, 9, 14, 99)] == (
        ["one", "one", "one", "one two ", "one two ", text, text]
    )
    assert cut("abcdef gh", 0, 4) == 4
    assert [begin(text, at) for at in (0, 2, 4, 6, 10)] == [0, 0, 4, 4, 9]


@settings(max_examples=60, deadline=None)
@given(split=st.sampled_from(["train", "test"]), index=st.integers(0, 10**6))
def test_a_stretch_is_whole_words_of_one_block_and_its_answer_goes_on(split, index):
    example = TASK.example(split, index)
    assert example == TASK.example(split, index)
    assert 0 < len(example.prompt) <= 400
    whole = [block for block in TASK.blocks[split] if example.prompt in block]
    assert whole
    words = example.prompt.split()
    assert set(words) <= set(whole[0].split())
    assert any(" ".join([*words, *example.answer.split()]) in " ".join(b.split()) for b in whole)


def test_lengths_reach_from_one_bound_to_the_other():
    lengths = [len(TASK.example("train", i).prompt) for i in range(400)]
    assert 100 <= min(lengths) < 130 and 370 < max(lengths) <= 400
    assert 220 < sum(lengths) / len(lengths) < 260


def test_text_with_little_white_space_has_no_short_stretch_and_no_empty_answer(tmp_path):
    """Paragraphs of 20 and of 500 characters without a space."""
    paragraphs = [chr(0x4E00 + i) * (20 if i % 2 else 500) for i in range(400)]
    (tmp_path / "a.txt").write_text("\n".join(paragraphs), encoding="utf-8")
    task = ContinuationConfig(files=[str(tmp_path / "a.txt")]).build()
    examples = [task.example("train", i) for i in range(300)]
    assert min(len(example.prompt) for example in examples) >= 100
    assert all(example.answer for example in examples)
    assert all(TASK.example("train", i).answer for i in range(3000))


def test_no_test_stretch_is_in_the_training_text():
    check_disjoint(TASK)
    blocks = {split: set(found) for split, found in TASK.blocks.items()}
    assert not blocks["train"] & blocks["test"]
    share = len(blocks["test"]) / (len(blocks["train"]) + len(blocks["test"]))
    assert 0.03 < share < 0.2
    for index in range(200):
        prompt = TASK.example("test", index).prompt
        assert not any(prompt in block for block in blocks["train"])


def test_files_are_read_in_order_and_copies_go_to_one_side(tmp_path):
    (tmp_path / "deep").mkdir()
    words = [" ".join(f"w{i}x{j}" for j in range(400)) for i in range(12)]
    (tmp_path / "a.txt").write_text("\n".join(words))
    (tmp_path / "deep" / "copy.txt").write_text("\n".join(words))
    (tmp_path / "other.md").write_text("not read")
    assert texts([f"{tmp_path}/**/*.txt"]) == ["\n".join(words)] * 2
    config = ContinuationConfig(
        files=[f"{tmp_path}/**/*.txt"], block_characters=300, max_characters=120, test_share=0.3
    )
    task = config.build()
    assert not set(task.blocks["train"]) & set(task.blocks["test"])
    check_disjoint(task, num_train=256)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"files": ["/nowhere/*.txt"]}, "task.files must be patterns of text files"),
        ({"min_characters": 500}, "must satisfy 1 <= min <= max, got 500, 400"),
        ({"block_characters": 500}, "task.block_characters must be at least 800"),
        ({"test_share": 1.0}, "task.test_share must be between 0 and 1, got 1.0"),
        ({"test_share": 1e-6}, "is in test; give more text"),
    ],
)
def test_bad_settings_name_their_key(given, message):
    with pytest.raises(ValueError, match=message):
        ContinuationConfig(**given).build()


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"must be UTF-8 text, got .*a\.txt"):
        ContinuationConfig(files=[str(tmp_path / "a.txt")]).build()


def test_no_answer_is_right():
    example = TASK.example("test", 0)
    assert not TASK.has_verifier
    assert TASK.outcome(example, example.answer) == 0.0


def test_a_resumed_run_refuses_text_that_has_changed(tmp_path):
    text = " ".join(f"word{i}" for i in range(4000))
    file = tmp_path / "a.txt"
    file.write_text(text)
    noted = ContinuationConfig(files=[str(file)]).build().bookmark(3)
    ContinuationConfig(files=[str(file)]).build().restore(noted)
    file.write_text(text.replace("word7 ", "word "))
    with pytest.raises(ValueError, match="task.files must hold what it held when the run began"):
        ContinuationConfig(files=[str(file)]).build().restore(noted)
