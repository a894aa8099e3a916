"""Rewards by import path: their styles, and what becomes of those that fail."""

import importlib
import json
import signal
import sys

import pytest

from mtp.tasks.base import Attempt, Example, RewardError, RunState
from mtp.tasks.reward_functions import detect_style
from mtp.tasks.reward_functions import load_reward as load_function
from mtp.tasks.rows import RowsConfig
from mtp.tasks.weighted_rewards import WeightedRewards, time_limit

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
def score_entry(entry, answer):
    return score_answer(answer, entry)
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
def length(completions, completion_ids, trainer_state, log_metric, log_extra):
    log_metric("shown", len(completions[0]))
    log_extra("ids", completion_ids)
    log_extra("half", [len(completion_ids[0]) / 2])
    state = trainer_state
    return [len(completion_ids[0]) + state.global_step / state.max_steps + state.epoch]
def chat(prompts, completions, answer):
    seen.append((prompts, completions))
    return [float(c[0]["content"] == a) for c, a in zip(completions, answer)]
def bad_extra(completions, log_extra):
    log_extra("column", [1, 2])
    return [1.0]
def odd(completions):
    return [1.0 if len(completions[0]) % 2 else None]
def even(completions):
    return [None if len(completions[0]) % 2 else 2.0]
met = []
async def meets(completions, barrier):
    met.append(completions[0])
    while len(met) < barrier[0]:
        await asyncio.sleep(0)
    return [float(len(met))]
async def blocks(completions):
    if completions[0] == "bad":
        while True:
            pass
    await asyncio.sleep(0)
    return [1.0]
async def late(completions):
    await asyncio.sleep(60 if completions[0] == "bad" else 0)
    return [1.0]
async def own_timeout(completions):
    raise TimeoutError("the server")
async def leaves(completions):
    sys.exit(3)
loops = []
async def loop(completions):
    loops.append(asyncio.get_running_loop())
    return [1.0]
def scoreless(solution_str, ground_truth):
    return {"reward": 1.0}
def near(completions, answer, tolerance):
    return [float(abs(float(c) - float(a)) <= t) for c, a, t in zip(completions, answer, tolerance)]
def brief(completions, answer, completion_ids):
    return [float(c == a and len(i) < 9) for c, a, i in zip(completions, answer, completion_ids)]
def part_0(completions, answer):
    return [float(c == str(a)) for c, a in zip(completions, answer)]
part_1, part_2 = (lambda completions, answer: part_0(completions, answer) for _ in range(2))
def added(completions, answer):
    return [(0.7 + 0.2 + 0.1) * (c == str(a)) for c, a in zip(completions, answer)]
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


def load_reward(path, style="auto", seconds=10.0):
    """(example, answer) -> score of one function; its own error if it raises."""
    rewards = WeightedRewards([load_function(path, style)], seconds=seconds)

    def reward(example, answer):
        try:
            return rewards([Attempt(example, answer)])[0].score
        except RewardError as failed:
            raise failed.error from None

    return reward


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
    names = ["answer", "log_extra", "log_metric", "thought", "trainer_state"]
    assert rewards.seen[0] == (["1+1="], ["2"], [3], names)


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


@pytest.mark.parametrize("name", ["score_answer", "score_entry"])
def test_reasoning_gym_style(rewards, name):
    """Parameters are given by name, whatever their order."""
    reward = load_reward(f"rewards_for_test:{name}")
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


def test_a_time_limit_leaves_another_alarm_on():
    """The one that ends a job whose launcher has died, see `common.watch`."""
    signal.setitimer(signal.ITIMER_REAL, 100)
    with time_limit(5):
        assert signal.getitimer(signal.ITIMER_REAL)[0] < 6
    assert 90 < signal.setitimer(signal.ITIMER_REAL, 0)[0] <= 100
    with time_limit(5):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


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


def weighted(*names, weights=(), **given):
    functions = [load_function(f"rewards_for_test:{name}") for name in names]
    return WeightedRewards(functions, weights, **given)


def test_the_further_arguments_of_trl(rewards):
    state = RunState(global_step=3, max_steps=12, epoch=2.0)
    (scored,) = weighted("length", state=lambda: state)([Attempt(EXAMPLE, "2", [7, 8, 9, 1])])
    assert scored.score == 4 + 3 / 12 + 2.0
    assert scored.metrics == [("shown", 1.0)]
    assert scored.extra == {"ids": "[7, 8, 9, 1]", "half": 2.0}
    with pytest.raises(RewardError, match="log_extra must get a list with one value per compl"):
        weighted("bad_extra")([Attempt(EXAMPLE, "2")])


def test_conversations_are_passed_as_trl_passes_them(rewards):
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": "1+1="})
    attempts = [
        Attempt(Example("1+1=", "2", messages=messages), "2"),
        Attempt(Example("1+1=", "2", messages=messages[1:]), "3"),
    ]
    assert [one.score for one in weighted("chat")(attempts)] == [1.0, 0.0]
    assert rewards.seen == [
        ([list(messages)], [[{"role": "assistant", "content": "2"}]]),
        ([[messages[1]]], [[{"role": "assistant", "content": "3"}]]),
    ]


def test_weights_and_functions_that_do_not_apply(rewards):
    """The values are added with their weights; None leaves a function out."""
    functions = weighted("odd", "even", "waits", weights=(0.5, 2.0, -1.0))
    one, two = functions([Attempt(EXAMPLE, "2"), Attempt(EXAMPLE, "22")])
    assert one.parts == {"odd": 1.0, "even": None, "waits": 1.0} and one.score == 0.5 - 1.0
    assert two.parts == {"odd": None, "even": 2.0, "waits": 0.0} and two.score == 4.0
    with pytest.raises(RewardError, match="odd returned None, .* no function .* applies"):
        weighted("odd")([Attempt(EXAMPLE, "22")])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward": ["exact", "exact"]}, "task.reward must name different functions"),
        ({"reward": []}, "task.reward must name different functions, got"),
        ({"reward": 3}, "task.reward must be exact, math, .* or a list of these, got 3"),
        ({"reward": ["exact"], "reward_weights": [1.0, 2.0]}, "one weight for each of the 1 fun"),
    ],
)
def test_lists_of_rewards_that_cannot_be(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        RowsConfig(source=write(tmp_path / "r.jsonl", sums(40)), **given).build()


def test_a_list_of_rewards_in_a_task(tmp_path, rewards):
    source = write(tmp_path / "r.jsonl", sums(40))
    paths = ["exact", "rewards_for_test:odd"]
    config = RowsConfig(source=source, reward=paths, reward_weights=[1.0, 0.25], right_at=1.25)
    task = config.build()
    example = next(e for i in range(20) if len((e := task.example("train", i)).answer) == 1)
    right, wrong = task.scored([Attempt(example, example.answer), Attempt(example, "x")])
    assert (right.score, right.outcome, wrong.score, wrong.outcome) == (1.25, 1.0, 0.25, 0.0)


def test_async_rewards_of_a_batch_run_together(rewards):
    """Each waits until all have begun, which one after the other would never end."""
    example = Example("p", "2", None, {"barrier": 3})
    scored = weighted("meets")([Attempt(example, answer) for answer in "abc"])
    assert [one.score for one in scored] == [3.0] * 3 and rewards.met == ["a", "b", "c"]


def test_async_rewards_share_an_event_loop(rewards):
    functions = weighted("loop")
    functions([Attempt(EXAMPLE, "2")])
    functions([Attempt(EXAMPLE, "3")])
    assert rewards.loops[0] is rewards.loops[1]


@pytest.mark.parametrize("name", ["late", "blocks"])
def test_an_async_reward_that_does_not_end_is_worth_0_and_spoils_no_other(rewards, name, caplog):
    functions = weighted(name, seconds=0.2)
    answers = ["good", "bad", "good"]
    scored = functions([Attempt(EXAMPLE, answer) for answer in answers])
    assert [one.score for one in scored] == [1.0, 0.0, 1.0]
    assert caplog.text.count("took over task.reward_seconds=0.2 for the answer 'bad'") == 1
    assert functions([Attempt(EXAMPLE, "good")])[0].score == 1.0


@pytest.mark.parametrize(("name", "error"), [("own_timeout", TimeoutError), ("leaves", SystemExit)])
def test_an_async_reward_that_fails_is_named(rewards, name, error):
    attempts = [Attempt(EXAMPLE, "2"), Attempt(EXAMPLE, "3")]
    with pytest.raises(RewardError) as failed:
        weighted(name)(attempts)
    assert isinstance(failed.value.error, error) and failed.value.attempt is attempts[0]


def test_a_report_shows_the_outcome_of_the_evaluation(tmp_path, rewards):
    """A reward that is a request to a server is not asked again for the same answer."""
    source = write(tmp_path / "r.jsonl", sums(40))
    task = RowsConfig(source=source, reward="rewards_for_test:length").build()
    example = task.example("train", 0)
    task.follow(lambda: RunState(1, 1, 0.0))
    assert task.scored([Attempt(example, "2", [1, 2])])[0].outcome == 1.0
    assert task.outcome(example, "2", [1, 2]) == 1.0
    for answer in ("2", "3"):
        with pytest.raises(ValueError, match="completion_ids are not known for an answer .*text"):
            task.outcome(example, answer)


def test_a_kept_outcome_is_that_of_the_same_completion_and_columns(tmp_path, rewards):
    rows = [{"prompt": "pi=", "answer": "3.14", "tolerance": value} for value in (0.5, 0.001)]
    source = write(tmp_path / "train.jsonl", rows)
    others = [{"prompt": "e=", "answer": "2.7", "tolerance": 1}]
    given = {"source": source, "test_source": write(tmp_path / "test.jsonl", others)}
    task = RowsConfig(reward="rewards_for_test:near", **given).build()
    examples = [task.example("train", i) for i in range(2)]
    found = [one.outcome for one in task.scored([Attempt(e, "3.3") for e in examples])]
    assert found == [task.outcome(e, "3.3") for e in examples] == [1.0, 0.0]
    task = RowsConfig(reward="rewards_for_test:brief", **given).build()
    attempts = [Attempt(examples[0], "3.14", ids) for ids in ([1] * 9, [1])]
    found = [one.outcome for one in task.scored(attempts)]
    assert found == [task.outcome(a.example, a.answer, a.completion_ids) for a in attempts]
    assert found == [0.0, 1.0]


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
def test_parts_that_sum_to_the_score_of_a_right_answer_make_one(tmp_path, rewards, weights):
    """0.7 + 0.2 + 0.1 is 0.9999999999999999 in floating point."""
    source = write(tmp_path / "r.jsonl", sums(40))
    names = [f"rewards_for_test:part_{i}" for i in range(3)]
    task = RowsConfig(source=source, reward=names, reward_weights=weights).build()
    example = task.example("train", 0)
    assert task.outcome(example, example.answer) == 1.0
    assert task.outcome(example, "x") == 0.0
    task = RowsConfig(source=source, reward="rewards_for_test:added").build()
    assert task.outcome(example, example.answer) == 1.0
