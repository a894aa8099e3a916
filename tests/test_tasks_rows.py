"""Rows from files and rewards by import path."""

import importlib
import json
import logging
import sys

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtp.tasks.base import Example, Task, check_disjoint, fingerprint
from mtp.tasks.math_answer import MathJudge
from mtp.tasks.rows import RowsConfig, in_test_share
from mtp.tasks.user_reward import detect_style, load_reward

REWARDS = """
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


def every(task: Task, split):
    return [task.example(split, i) for i in range(task.size(split))]


def test_rows_become_examples(tmp_path):
    source = write(tmp_path / "sums.jsonl", sums(200))
    task = RowsConfig(source=source, num_test=1000, test_share=0.25).build()
    examples = {e.prompt: e for e in every(task, "train") + every(task, "test")}
    assert len(examples) == 200
    assert examples["7+1="] == Example(
        "7+1=", "8", "7 and 1", {"prompt": "7+1=", "answer": 8, "thought": "7 and 1", "level": 1}
    )
    assert 25 <= task.size("test") <= 75
    assert task.outcome(examples["7+1="], "8") == 1.0
    assert task.outcome(examples["7+1="], "8.0") == 0.0
    check_disjoint(task)


def test_more_rows_move_no_question(tmp_path):
    few = RowsConfig(source=write(tmp_path / "a.jsonl", sums(60)), num_test=999).build()
    many = RowsConfig(source=write(tmp_path / "b.jsonl", sums(90)), num_test=999).build()
    for split in ("train", "test"):
        small = {e.prompt for e in every(few, split)}
        assert small == {e.prompt for e in every(many, split)} & {f"{i}+1=" for i in range(60)}


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=40, max_size=80), st.floats(0.2, 0.8))
def test_copies_of_a_question_go_to_one_side(tmp_path_factory, numbers, share):
    rows = [{"prompt": f" {n}+1= ", "answer": str(i)} for i, n in enumerate(numbers)]
    source = write(tmp_path_factory.mktemp("rows") / "r.jsonl", rows)
    held_out = {n for n in numbers if in_test_share(fingerprint(Example(f"{n}+1=", "")), share)}
    assume(held_out and held_out != set(numbers))
    task = RowsConfig(source=source, num_test=999, test_share=share).build()
    train = {e.prompt for e in every(task, "train")}
    test = {e.prompt for e in every(task, "test")}
    assert test == {f"{n}+1=" for n in held_out}
    assert train == {f"{n}+1=" for n in set(numbers) - held_out}
    assert task.size("train") + task.size("test") == len(numbers)


def test_share_is_that_of_the_hashes():
    hashes = [fingerprint(Example(str(i), "")) for i in range(4000)]
    assert sum(in_test_share(h, 0.1) for h in hashes) == pytest.approx(400, abs=80)
    assert in_test_share("0" * 16, 1e-9) and not in_test_share("f" * 16, 0.999999)


def test_explicit_test_rows_are_kept_from_training(tmp_path, caplog):
    train = write(tmp_path / "train.jsonl", sums(10))
    test = write(tmp_path / "test.jsonl", sums(3))
    with caplog.at_level(logging.WARNING):
        task = RowsConfig(source=train, test_source=test).build()
    assert {e.prompt for e in every(task, "test")} == {"0+1=", "1+1=", "2+1="}
    assert [e.prompt for e in every(task, "train")] == [f"{i}+1=" for i in range(3, 10)]
    assert "dropped 3 of 10 training rows" in caplog.text


def test_num_test_takes_the_same_sample(tmp_path):
    source = write(tmp_path / "sums.jsonl", sums(200))
    whole = RowsConfig(source=source, num_test=999).build()
    part = RowsConfig(source=source, num_test=5).build()
    assert every(part, "test") == every(whole, "test")[:5]
    assert every(part, "train") == every(whole, "train")


def test_parquet_and_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(sums(40))
    rows.to_parquet(tmp_path / "sums.parquet")
    rows.save_to_disk(tmp_path / "saved")
    both = datasets.DatasetDict(
        {"train": rows.select(range(30)), "test": rows.select(range(30, 40))}
    )
    both.save_to_disk(tmp_path / "both")
    wanted = RowsConfig(source=write(tmp_path / "sums.jsonl", sums(40))).build()
    for name in ("sums.parquet", "saved"):
        task = RowsConfig(source=str(tmp_path / name)).build()
        assert every(task, "train") == every(wanted, "train")
    task = RowsConfig(source=str(tmp_path / "both"), test_split="test").build()
    assert [e.prompt for e in every(task, "train")] == [f"{i}+1=" for i in range(30)]
    assert {e.prompt for e in every(task, "test")} == {f"{i}+1=" for i in range(30, 40)}


def test_columns_by_name_and_within_columns(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}+1="}],
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
        }
        for i in range(40)
    ]
    source = write(tmp_path / "verl.jsonl", rows)
    task = RowsConfig(source=source, answer_column="reward_model.ground_truth").build()
    example = next(e for e in every(task, "train") + every(task, "test") if e.prompt == "7+1=")
    assert example.answer == "8" and example.thought is None
    assert example.columns["reward_model"]["style"] == "rule"


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (None, {}, "task.source must be an existing file, got .*rows.jsonl"),
        ([], {}, "task.source must hold at least one row, got none"),
        ([{"prompt": "a"}], {}, r"task.answer_column .*got 'answer', but row 0 of .*\['prompt'\]"),
        ([{"question": "a", "answer": "b"}], {}, r"task.prompt_column .*got 'prompt'"),
        ([{"prompt": "a", "answer": None}], {}, "task.answer_column must name a filled column"),
        ([{"prompt": " ", "answer": "b"}], {}, "task.prompt_column must hold text, got an empty"),
        ([{"prompt": "a", "answer": ["b"]}], {}, r"task.answer_column must hold text.*\['b'\]"),
        ([{"prompt": "a", "answer": True}], {}, "task.answer_column must hold text"),
        ([{"prompt": [1, 2], "answer": "b"}], {}, "one user message, no more"),
        ([3], {}, "line 1 of .* must be an object, got 3"),
        ([{"prompt": "a", "answer": "b"}], {}, "needs at least one (train|test) row"),
        (sums(9), {"test_share": 0.0}, "task.test_share must be between 0 and 1, got 0.0"),
        (sums(9), {"num_test": 0}, "task.num_test must be at least 1, got 0"),
        (sums(9), {"right_at": float("nan")}, "task.right_at must be a finite number"),
        (sums(9), {"test_source": "none.parquet"}, "task.test_source must be an existing file"),
        (sums(9), {"reward": "exactly"}, "task.reward must be exact, math or .*got 'exactly'"),
        (sums(9), {"reward": "no_such_module_:f"}, "importing 'no_such_module_' failed"),
        (sums(9), {"reward": "json:scores"}, r"'json' has no function 'scores'; it has .*'loads'"),
        (sums(9), {"reward_style": "ppo"}, "task.reward_style must be auto or one of"),
    ],
)
def test_bad_input_names_key_and_remedy(tmp_path, rows, settings, message):
    path = tmp_path / "rows.jsonl"
    if rows is not None:
        write(path, rows)
    with pytest.raises(ValueError, match=message):
        RowsConfig(**{"source": str(path), **settings}).build()


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt"\n')
    with pytest.raises(ValueError, match="task.source: line 2 of .* is not JSON"):
        RowsConfig(source=str(tmp_path / "a.jsonl")).build()
    (tmp_path / "a.csv").write_text("prompt,answer\n")
    with pytest.raises(ValueError, match="must end in .jsonl or .parquet"):
        RowsConfig(source=str(tmp_path / "a.csv")).build()
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="could not be read as Parquet"):
        RowsConfig(source=str(tmp_path / "a.parquet")).build()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="could not be opened by datasets .*split 'train'"):
        RowsConfig(source=str(tmp_path / "empty")).build()
    with pytest.raises(ValueError, match="task.source must be"):
        RowsConfig().build()


def test_line_separators_within_a_string(tmp_path):
    rows = [{"prompt": f"a\u2028{i}", "answer": "b"} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    task = RowsConfig(source=str(path)).build()
    assert task.example("train", 0).prompt.startswith("a\u2028")


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
    with pytest.raises(ValueError, match="cannot tell the style of .*:unclear .*task.reward_style"):
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


@pytest.fixture(scope="module")
def judge():
    return MathJudge(seconds=2)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("1/2", "0.5", 1.0),
        (r"\frac{1}{2}", "1/2", 1.0),
        (r"$\frac{1}{2}$", r"\frac{2}{4}", 1.0),
        ("12", "13", 0.0),
        ("12", "", 0.0),
        ("x+1", "1+x", 1.0),
        ("1,000", "1000", 1.0),
        ("(1,2)", "(2,1)", 0.0),
    ],
)
def test_math_equality(judge, gold, answer, right):
    assert judge(gold, answer) == right


def test_math_that_does_not_end_is_wrong_and_the_judge_goes_on(judge):
    assert judge("12", "9**9**9") == 0.0
    assert judge("12", "24/2") == 1.0


def test_gold_answers_that_are_no_mathematics(judge):
    with pytest.raises(ValueError, match="gold answer must be a mathematical expression.*got ''"):
        judge("", "1")


def test_the_math_reward(tmp_path):
    source = write(tmp_path / "r.jsonl", sums(40))
    task = RowsConfig(source=source, reward="math").build()
    example = task.example("train", 0)
    assert task.outcome(example, f"{int(example.answer) * 2}/2") == 1.0
    assert task.outcome(example, "1/7") == 0.0
