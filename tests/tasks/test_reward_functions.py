"""Rewards by import path: their styles, and what becomes of those that fail."""

import importlib
import json
import sys

import pytest

from mtp.tasks.base import Example
from mtp.tasks.reward_functions import detect_style, load_reward
from mtp.tasks.rows import RowsConfig

REWARDS = """
import asyncio, sys
import numpy, torch
seen = []
def trl(prompts, completions, completion_ids, level, **columns):
    seen.append((prompts, completions, level, sorted(columns)))
    return [float(c == a) for c, a in zip(completions, columns["answer"])]
def trl_short(completions, answer):
    return [2.0 if c == a else None for c, a in zip(completions, answer)]
def trl_ids(completions, completion_ids):
    return [float(len(ids)) for ids in completion_ids]
def trl_many(completions):
    return [1.0, 0.0]
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    seen.append((data_source, solution_str, ground_truth, extra_info))
    return {"score": 1.0 if solution_str == ground_truth else 0.1}
def score_answer(answer, entry):
    return float(answer == entry["answer"] and entry["question"] == "1+1=" and entry["level"] == 3)
def raises(answer, entry):
    raise KeyError("oracle")
def nan(answer, entry):
    return float("nan")
def unclear(guess, truth):
    return 1.0
def unclear_but_named(*arguments):
    return float(arguments == ("2", arguments[1]))
async def waits(completions, answer):
    await asyncio.sleep(0)
    return [float(c == a) for c, a in zip(completions, answer)]
async def sleeps(answer, entry):
    await asyncio.sleep(60)
class Verifier:
    async def __call__(self, solution_str, ground_truth):
        return {"score": float(solution_str == ground_truth)}
verifier = Verifier()
def exits(answer, entry):
    sys.exit(0)
def interrupts(answer, entry):
    raise KeyboardInterrupt
def cancels(answer, entry):
    raise asyncio.CancelledError
def text(answer, entry):
    return "1.0"
def array(answer, entry):
    return numpy.float32(0.5)
def tensor(answer, entry):
    return torch.tensor([[1.0]])
def tensors(answer, entry):
    return torch.tensor([1.0, 2.0])
def bare(completions):
    return 1.0
def scoreless(solution_str, ground_truth):
    return {"reward": 1.0}
value = 3
"""
EXAMPLE = Example("1+1=", "2", "one and one", {"prompt": "1+1=", "answer": "2", "level": 3})


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """A module of rewards."""
    (tmp_path / "rewards_for_test.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards_for_test", raising=False)
    return importlib.import_module("rewards_for_test")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count):
    return [
        {"prompt": f"{i}+1=", "answer": i + 1, "thought": f"{i} and 1", "level": i % 3}
        for i in range(count)
    ]


def test_trl_style(rewards):
    reward = load_reward("rewards_for_test:trl")
    assert reward(EXAMPLE, "2") == 1.0 and reward(EXAMPLE, "3") == 0.0
    assert rewards.seen[0] == (["1+1="], ["2"], [3], ["answer", "thought"])


def test_trl_style_without_the_parameters_it_does_not_need(rewards):
    reward = load_reward("rewards_for_test:trl_short")
    assert reward(EXAMPLE, "2") == 2.0
    with pytest.raises(TypeError, match="returned None"):
        reward(EXAMPLE, "3")


def test_trl_style_asking_for_what_is_not_there(rewards):
    assert load_reward("rewards_for_test:trl_many")
    with pytest.raises(ValueError, match="one number a completion, got 2 for one"):
        load_reward("rewards_for_test:trl_many")(EXAMPLE, "2")
    with pytest.raises(TypeError, match="completion_ids are not known"):
        load_reward("rewards_for_test:trl_ids")(EXAMPLE, "2")


def test_verl_style(rewards):
    reward = load_reward("rewards_for_test:compute_score")
    assert reward(EXAMPLE, "2") == 1.0 and reward(EXAMPLE, "3") == 0.1
    assert rewards.seen[0] == ("", "2", "2", EXAMPLE.columns)
    marked = Example("p", "2", None, {"data_source": "gsm8k", "extra_info": {"index": 4}})
    reward(marked, "2")
    assert rewards.seen[2] == ("gsm8k", "2", "2", {"index": 4})


def test_reasoning_gym_style(rewards):
    reward = load_reward("rewards_for_test:score_answer")
    assert reward(EXAMPLE, "2") == 1.0 and reward(EXAMPLE, "3") == 0.0


def test_an_explicit_style_overrules_the_names(rewards):
    assert detect_style(rewards.trl, "trl") == "trl"
    with pytest.raises(
        ValueError, match="cannot determine the style of .*:unclear .*task.reward_style"
    ):
        load_reward("rewards_for_test:unclear")
    reward = load_reward("rewards_for_test:unclear_but_named", "reasoning_gym")
    assert reward(EXAMPLE, "2") == 1.0 and reward(EXAMPLE, "3") == 0.0


def test_a_function_must_be_one(rewards):
    with pytest.raises(ValueError, match="has no function 'value'"):
        load_reward("rewards_for_test:value")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "raises",
            r"the reward raised KeyError\('oracle'\) \(task rows/r.jsonl, prompt '.*answer 'x'",
        ),
        (
            "nan",
            r"must be a finite number, got nan \(task rows/r.jsonl, prompt '\d+\+1=', answer 'x'",
        ),
    ],
)
def test_a_reward_that_fails_names_task_and_sample(tmp_path, rewards, name, message):
    source = write(tmp_path / "r.jsonl", sums(40))
    task = RowsConfig(source=source, reward=f"rewards_for_test:{name}").build()
    with pytest.raises(ValueError, match=message):
        task.outcome(task.example("train", 0), "x")


def test_right_at_sets_the_bar(tmp_path, rewards):
    source = write(tmp_path / "r.jsonl", sums(40))
    config = RowsConfig(source=source, reward="rewards_for_test:compute_score")
    strict = config.build()
    config.right_at = 0.1
    lenient = config.build()
    example = strict.example("train", 0)
    assert strict.score(example, "no") == 0.1
    assert (strict.outcome(example, "no"), lenient.outcome(example, "no")) == (0.0, 1.0)


def test_an_async_reward_is_awaited(tmp_path, rewards):
    reward = load_reward("rewards_for_test:waits")
    assert (reward(EXAMPLE, "2"), reward(EXAMPLE, "3")) == (1.0, 0.0)
    reward = load_reward("rewards_for_test:verifier")
    assert (reward(EXAMPLE, "2"), reward(EXAMPLE, "3")) == (1.0, 0.0)


def test_an_async_reward_has_the_time_limit_too(rewards, caplog):
    assert load_reward("rewards_for_test:sleeps", seconds=0.2)(EXAMPLE, "2") == 0.0
    assert "took over task.reward_seconds=0.2" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exits", r"the reward raised SystemExit\(0\) \(task rows/r.jsonl, prompt"),
        ("cancels", r"the reward raised CancelledError\(\) \(task rows/r.jsonl, prompt"),
        ("text", r"it must return a number, got '1.0' \(str\)"),
        ("tensors", r"it must return a number, got tensor\(.*\(Tensor\)"),
        ("bare", "it must return a list of numbers, got 1.0"),
        ("scoreless", r"its dict must have a `score`, got \['reward'\]"),
    ],
)
def test_what_a_reward_may_not_do_is_named(tmp_path, rewards, name, message):
    source = write(tmp_path / "r.jsonl", sums(40))
    task = RowsConfig(source=source, reward=f"rewards_for_test:{name}").build()
    with pytest.raises(ValueError, match=message):
        task.outcome(task.example("train", 0), "x")


def test_a_number_of_numpy_or_torch_is_one(rewards):
    assert load_reward("rewards_for_test:array")(EXAMPLE, "2") == 0.5
    assert load_reward("rewards_for_test:tensor")(EXAMPLE, "2") == 1.0


def test_ctrl_c_within_a_reward_ends_the_run(tmp_path, rewards):
    source = write(tmp_path / "r.jsonl", sums(40))
    task = RowsConfig(source=source, reward="rewards_for_test:interrupts").build()
    with pytest.raises(KeyboardInterrupt):
        task.outcome(task.example("train", 0), "x")


def test_a_reward_that_cannot_be_looked_into_is_named():
    with pytest.raises(ValueError, match="task.reward must be a function whose parameters"):
        load_reward("builtins:max")


def test_a_module_that_exits_is_named(tmp_path, monkeypatch):
    (tmp_path / "exits_at_import.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="importing 'exits_at_import' failed: SystemExit"):
        load_reward("exits_at_import:f")
