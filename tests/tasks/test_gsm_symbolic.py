"""gsm_symbolic: its sets share no question, its thoughts lead to the answer, its answers score."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from mtp.tasks.base import Example, check_disjoint, fingerprint, held_out_sets
from mtp.tasks.gsm_symbolic import GsmSymbolicConfig

TASK = GsmSymbolicConfig(num_test=200, num_validation=60).build()
HELD_OUT = {4, 9, 14, 19, 24, 29, 34, 39, 44, 49, 54, 59, 64, 69, 84, 89, 94, 99}
SETS = ("train", "test", "validation", "unseen_templates")


def templates(split: str, number: int) -> Counter[int]:
    return Counter(TASK.example(split, i).columns["template"] for i in range(number))


def test_a_worked_item():
    example = next(
        e for e in (TASK.example("train", i) for i in range(2000)) if e.columns["template"] == 43
    )
    first, second = example.thought.split("\n")
    assert first.startswith("His ") and " - " in first and " + " in second
    assert "####" not in example.thought
    assert f"= {example.answer} " in second
    assert example.prompt.endswith("Do not include units.")
    assert TASK.true_steps(example.thought) == (2, 2)


def test_true_steps_counts_equations_that_can_be_read():
    thought = "He has 3 * $20 = $60.\nThen 60 - 5 = 54 left.\nThat is x = 5.\nWell done."
    assert TASK.true_steps(thought) == (1, 2)
    assert TASK.true_steps("") == (0, 0)


def test_templates_of_the_sets():
    assert set(templates("unseen_templates", 200)) == HELD_OUT
    trained = set(templates("train", 3000))
    assert len(trained) == 85 - len(HELD_OUT)
    for split in ("test", "validation"):
        assert set(templates(split, TASK.size(split))) <= trained


def test_no_question_is_in_two_sets():
    numbers = {split: TASK.size(split) for split in held_out_sets(TASK)} | {"train": 3000}
    assert numbers == {"test": 200, "validation": 60, "unseen_templates": 200, "train": 3000}
    found = {s: {fingerprint(TASK.example(s, i)) for i in range(n)} for s, n in numbers.items()}
    for split in held_out_sets(TASK):
        assert len(found[split]) == numbers[split], "held-out questions are distinct"
    assert len(set.union(*found.values())) == sum(map(len, found.values()))
    check_disjoint(TASK, num_train=500)


def test_held_out_questions_are_taken_out_of_training():
    """A template with few questions, whose training items repeat those of tests."""
    task = GsmSymbolicConfig(templates=[52, 4], num_test=100, num_validation=60).build()
    sets = {"test": 100, "validation": 60}
    held_out = {fingerprint(task.example(s, i)) for s, n in sets.items() for i in range(n)}
    items = {fingerprint(task._sound_example(i)) for i in task._train[:2000]}
    assert items & held_out, "the precaution is needed here"
    assert not {fingerprint(task.example("train", i)) for i in range(2000)} & held_out


@pytest.mark.parametrize("split", SETS)
def test_thoughts_hold_no_false_step_and_answers_are_right(split):
    for index in range(60):
        example = TASK.example(split, index)
        true, steps = TASK.true_steps(example.thought)
        assert true == steps
        assert TASK.outcome(example, example.answer) == 1.0


def test_items_with_false_steps_are_left_out():
    """Template 75 halves a number of tubes and rounds down: 13*0.5=6."""
    task = GsmSymbolicConfig(templates=[75, 4], num_test=20, num_validation=20).build()
    items = task._items_of([75])[:100]
    kept = [example for item in items if (example := task._sound_example(item)) is not None]
    assert 30 < len(kept) < 70
    assert all(int(e.thought.split(" has ")[1].split("*")[0]) % 2 == 0 for e in kept)


def test_nearly_all_steps_can_be_checked():
    """Share of the thoughts' lines with a number after `=` in which an equation is read."""
    lines = [
        line
        for i in range(500)
        for line in TASK.example("train", i).thought.split("\n")
        if "=" in line
    ]
    checked = [line for line in lines if TASK.true_steps(line)[1]]
    assert 0.95 < len(checked) / len(lines) < 1


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        ("18", "18", 1.0),
        ("18", "18.0", 1.0),
        ("78000", "$78,000", 1.0),
        ("-3", "-3", 1.0),
        ("18", "18 oz", 0.0),
        ("18", "17 or 18", 0.0),
        ("18", "18.", 0.0),
        ("18", "", 0.0),
        ("18", "1,8", 0.0),
        ("3", "-3", 0.0),
    ],
)
def test_an_answer_is_one_number(gold, answer, outcome):
    assert TASK.outcome(Example("?", gold), answer) == outcome


def test_items_do_not_depend_on_the_hash_seed():
    script = (
        "from mtp.tasks.gsm_symbolic import GsmSymbolicConfig as C\n"
        "task = C(num_test=100, num_validation=1).build()\n"
        "print([task.example(s, i) for s in ('test', 'unseen_templates') for i in range(100)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"templates": [6, 4, 32]}, r"task.templates must be .* got \[32\]"),
        ({"templates": [6, 10]}, "task.held_out_every=5 holds out none; add"),
        ({"templates": [4, 9]}, r"task.held_out_every=5 holds out \[4, 9\]; add"),
        ({"templates": [52, 4], "num_test": 5000}, r"task.num_test must be at most \d+, .*add"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(ValueError, match=message):
        GsmSymbolicConfig(**settings).build()
