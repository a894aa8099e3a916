"""The draft vocabulary of a new head: its training data's most frequent tokens, or a list."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_export import PHASES, tiny_text

from mtp.hub.build import ModelConfig, build_model
from mtp.hub.draft_vocabulary import frequent_tokens
from mtp.modeling.heads import HeadConfig
from mtp.rollouts.rollout import DecodingConfig
from mtp.tasks.base import Example
from mtp.tasks.running_sum import RunningSum, RunningSumConfig

MAIN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(size=12, **model):
    head = HeadConfig(
        type="eagle3",
        hidden_size=32,
        intermediate_size=24,
        options={"draft_vocab_size": size} if size else {},
    )
    task = RunningSum(RunningSumConfig())
    return build_model(ModelConfig(config=MAIN, **model), head, DecodingConfig(phases=PHASES), task)


def test_delimiters_come_first_then_the_most_frequent_then_the_lowest():
    text = tiny_text()
    vocabulary = text.tokenizer.get_vocab()
    task = SimpleNamespace(
        size=lambda split: 2,
        example=lambda split, index: Example(
            prompt="8=", thought=("77", "9977;")[index], answer="9"
        ),
    )
    marks = sorted(text.plan().marks)
    ranked = [vocabulary[c] for c in "79;"]  # 7 four times, 9 four times (answers too), ; once
    assert frequent_tokens(task, text, len(marks) + 3) == [*marks, *ranked]
    unused = next(i for i in range(20) if i not in (*marks, *ranked))
    assert frequent_tokens(task, text, len(marks) + 4) == [*marks, *ranked, unused]
    assert frequent_tokens(task, text, 1) == marks[:1]


def test_a_new_head_has_the_frequent_tokens_and_mains_rows_for_them():
    torch.manual_seed(0)
    model, text = build()
    tokens = model.mtp_head.draft_tokens.tolist()
    assert text.plan().marks <= set(tokens)
    task = RunningSum(RunningSumConfig())
    written = "".join(e.thought + e.answer for e in (task.example("train", i) for i in range(4096)))
    ids = text.tokenizer.get_vocab()
    counts = {ids[c]: written.count(c) for c in "0123456789+=;"}
    inside = [count for token, count in counts.items() if token in tokens]
    assert min(inside) >= max(count for token, count in counts.items() if token not in tokens)
    main, head = model.output_layers()
    assert torch.equal(head.weight, main.weight[tokens])
    torch.manual_seed(1)
    assert build()[0].mtp_head.draft_tokens.tolist() == tokens


def test_a_list_in_a_file_replaces_them(tmp_path):
    tokens, file = [16, 0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14], tmp_path / "tokens.json"
    file.write_text(json.dumps(tokens))
    model, _ = build(draft_tokens=str(file))
    assert model.mtp_head.draft_tokens.tolist() == sorted(tokens)
    with pytest.raises(ValueError, match="must be head.options.draft_vocab_size=9 .*tokens.json"):
        build(9, draft_tokens=str(file))
    with pytest.raises(ValueError, match="model.draft_tokens must be null, .* whole vocabulary"):
        build(0, draft_tokens=str(file))
    for content in ("[1, 2", '{"a": 1}', "[1.5]"):
        file.write_text(content)
        with pytest.raises(ValueError, match="model.draft_tokens must be a JSON file with a list"):
            build(draft_tokens=str(file))
    with pytest.raises(ValueError, match="model.draft_tokens must be a JSON file with a list"):
        build(draft_tokens=str(tmp_path / "missing.json"))
