"""Tokenizers of models from scratch."""

import pytest
from helpers import config

from mtp.hub.build import load_model
from mtp.rollouts.new_tokenizers import text_tokenizer
from mtp.trainer import train

MARKS = ["<think>", "</think>"]
TEXTS = [f"David has {n} / 2 = {n // 2} friends." for n in range(20, 60, 2)]
TINY = [
    "experiment=gsm_symbolic_tiny",
    "model.tokenizer_vocab_size=300",
    "model.config.hidden_size=16",
    "model.config.intermediate_size=16",
    "head.hidden_size=16",
    "head.intermediate_size=16",
    "stages.main.steps=1",
    *(f"stages.{stage}.steps=0" for stage in ("head", "joint", "rl")),
    "evaluation.num_problems=2",
    "evaluation.num_interim_problems=2",
    "decoding.max_new_tokens=40",
]


def test_frequent_words_are_tokens_and_every_text_can_be_written():
    tokenizer = text_tokenizer(TEXTS, 320, MARKS)
    assert tokenizer.tokenize("David has 24 friends.") == [
        "David",
        "Ġhas",
        "Ġ",
        "2",
        "4",
        "Ġfriends",
        ".",
    ]
    for text in ("Zoë pays £3,\n  twice", "日本 \t x", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("<think>9</think>9")
    assert [tokenizer.decode([i]) for i in ids] == ["<think>", "9", "</think>", "9"]
    assert len(tokenizer) <= 320


def test_the_same_texts_give_the_same_tokenizer():
    one, two = (text_tokenizer(TEXTS, 300, MARKS).get_vocab() for _ in range(2))
    assert one == two and 260 < len(one) <= 300


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    message = "model.tokenizer_vocab_size must be at least 260, .* got 259"
    with pytest.raises(ValueError, match=message):
        text_tokenizer(TEXTS, 259, MARKS)
    assert len(text_tokenizer(TEXTS, 260, MARKS)) == 260


@pytest.mark.parametrize("delimiter", ["<eos>", "", "="])
def test_a_delimiter_that_is_no_token_of_its_own_is_refused(delimiter):
    with pytest.raises(ValueError, match="must be a token of its own"):
        text_tokenizer(TEXTS, 300, [*MARKS, delimiter])


def test_a_model_from_scratch_reads_english_and_loads_again(tmp_path):
    run = config(tmp_path, *TINY)
    train(run)
    model, fmt = load_model(tmp_path / "export")
    example = run.task.build().example("test", 0)
    prompt = fmt.question_ids(example)
    assert example.prompt in fmt.tokenizer.decode(prompt)
    assert model.main_config.vocab_size == len(fmt.tokenizer) == 300


def test_a_pretrained_model_has_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="model.tokenizer_vocab_size must be null, got 300: .*rem"):
        config(tmp_path, *TINY, "model.source=some/model").model.validate()
