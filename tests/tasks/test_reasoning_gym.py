"""reasoning-gym tasks: splits, outcomes and what is refused."""

import pytest

from mtp.tasks.base import Example, check_disjoint, fingerprint
from mtp.tasks.reasoning_gym import ReasoningGymConfig, read_score


def build(dataset: str, **settings):
    return ReasoningGymConfig(
        **{"num_test": 8, "num_train": 50, "dataset": dataset, **settings}
    ).build()


def test_splits_share_no_question_where_questions_repeat():
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 questions
    task = build("chain_sum", options=options, num_test=64, num_train=500)
    test = {fingerprint(task.example("test", i)) for i in range(task.size("test"))}
    train = {fingerprint(task.example("train", i)) for i in range(task.size("train"))}
    assert len(test) == task.size("test") < 64  # repeated questions count once
    assert task.size("train") == 500
    assert not test & train
    check_disjoint(task)


def test_training_items_come_after_the_test_items():
    from reasoning_gym.factory import create_dataset

    raw = create_dataset("leg_counting", seed=3, size=60)
    task = build("leg_counting", seed=3)
    assert [task.example("test", i).prompt for i in range(8)] == [
        raw[i]["question"].strip() for i in range(8)
    ]
    assert [task.example("train", i).prompt for i in range(50)] == [
        raw[8 + i]["question"].strip() for i in range(50)
    ]


def test_examples_repeat_in_a_new_task():
    first, again = build("gcd"), build("gcd")
    for split in ("train", "test"):
        assert first.example(split, 5) == again.example(split, 5)


def test_too_few_questions_name_the_remedy():
    task = build("coin_flip", options={"min_trials": 3, "max_trials": 3}, num_test=400)
    with pytest.raises(ValueError, match="lower task.num_test"):
        check_disjoint(task)


def test_only_the_full_score_is_right():
    task = build("chain_sum")
    example = task.example("test", 0)
    gold = example.answer
    assert task.outcome(example, gold) == 1.0
    assert task.outcome(example, f"+{gold}.0" if not gold.startswith("-") else f"{gold}.0") == 1.0
    stuffed = f"x {gold}"
    assert 0 < task.score(example, stuffed) < 1
    assert task.outcome(example, stuffed) == 0.0
    assert task.outcome(example, "") == 0.0


def test_a_floor_for_wrong_answers_is_no_outcome():
    task = build("countdown", num_test=2)
    example = task.example("test", 0)
    assert task.score(example, "nothing") == 0.01
    assert task.outcome(example, "nothing") == 0.0


def test_an_answer_that_the_scorer_cannot_read_is_wrong():
    task = build("prime_factorization")
    example = task.example("test", 0)
    with pytest.raises(ValueError, match="invalid literal"):
        task._dataset.score_answer("two times three", example.columns["entry"])
    assert task.outcome(example, "two times three") == 0.0
    assert task.outcome(example, example.answer) == 1.0
    assert read_score(lambda answer, entry: entry["missing"], "1", {}) == 0.0


def test_scores_that_are_not_finite_name_task_and_sample(monkeypatch):
    task = build("gcd")
    example = task.example("test", 0)
    monkeypatch.setattr(task._dataset, "score_answer", lambda answer, entry: float("nan"))
    with pytest.raises(ValueError, match="got nan .task reasoning_gym/gcd, prompt 'Find the Gr"):
        task.outcome(example, "5")


def test_datasets_without_a_solver_have_no_thoughts():
    task = build("spell_backward")
    assert task.example("test", 0).thought is None
    assert task.true_steps("a;b") is None
    assert build("letter_counting").true_steps("The 1;1=1") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dataset": "leg_countin"},
            r"task.dataset must be .* got 'leg_countin'; .*'leg_counting'",
        ),
        ({"dataset": ""}, "task.dataset must be a reasoning-gym dataset, got ''"),
        ({"dataset": "graph_color"}, "gold answers, but the answer of .* item 0 is None"),
        ({"dataset": "rush_hour"}, "gold answers"),
        ({"dataset": "game_of_life_halting"}, "takes 'qwx zvk' for a right answer"),
        ({"dataset": "list_functions"}, "same item at every call"),
        (
            {"dataset": "gcd", "options": {"digits": 3}},
            r"must be among .*'max_value'.*got \['digits'",
        ),
        ({"dataset": "gcd", "options": {"seed": 3}}, "use task.seed and task.num_train"),
        (
            {"dataset": "gcd", "options": {"min_value": 0}},
            "do not fit gcd: .*min_value must be pos",
        ),
        ({"dataset": "gcd", "options": {"max_value": "x"}}, "do not fit gcd"),
        ({"dataset": "spell_backward", "thoughts": True}, "task.thoughts needs .*'chain_sum'"),
        ({"dataset": "gcd", "options": [3]}, r"task.options must be a mapping .* got \[3\]"),
        ({"dataset": "gcd", "num_test": 0}, "task.num_test must be at least 1, got 0"),
        ({"dataset": "gcd", "num_train": 0}, "task.num_train must be at least 1, got 0"),
        (
            {"dataset": "gsm_symbolic", "options": {"difficulty": 7}},
            "do not fit gsm_symbolic|failed",
        ),
    ],
)
def test_impossible_settings_name_their_key(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_items_that_follow_the_hash_seed_need_one(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match="PYTHONHASHSEED=0"):
        build("ransom_note")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert isinstance(build("ransom_note").example("test", 0), Example)
