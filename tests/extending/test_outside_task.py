"""A task with its reward from outside the package: problems that a run trains on and scores."""

from dataclasses import dataclass

import pytest
from helpers import config

from mtp.tasks.base import Example, Split, Task, TaskConfig, check_disjoint
from mtp.trainer import train

LETTERS = "abcdefgh"


@dataclass(kw_only=True)
class ReversalConfig(TaskConfig):
    """Words to be written backwards."""

    def build(self) -> "Reversal":
        return Reversal(self.num_test)


class Reversal(Task):
    """Reverse a word of four letters. Every fifth word is held out."""

    name = "reversal"
    alphabet = LETTERS + ":|"

    def __init__(self, num_test: int):
        words = [a + b + c + d for a in LETTERS for b in LETTERS for c in LETTERS for d in "abcd"]
        self._words = {"train": [w for i, w in enumerate(words) if i % 5]}
        self._words["test"] = words[::5][:num_test]

    def size(self, split: Split) -> int:
        return len(self._words[split])

    def example(self, split: Split, index: int) -> Example:
        word = self._words[split][index]
        return Example(f"{word}:", word[::-1], "|".join(word[::-1]))

    def score(self, example: Example, answer: str) -> float:
        """The reward: the share of letters in their right place."""
        right = sum(a == b for a, b in zip(answer, example.answer, strict=False))
        return right / max(len(answer), len(example.answer))


def test_the_reward_is_that_of_the_task():
    task = Reversal(10)
    example = task.example("test", 0)
    assert (example.prompt, example.answer) == ("aaaa:", "aaaa")
    assert task.score(Example("abcd:", "dcba"), "dcab") == 0.5
    assert task.outcome(Example("abcd:", "dcba"), "dcab") == 0.0
    assert task.outcome(Example("abcd:", "dcba"), "dcba") == 1.0
    check_disjoint(task)


def test_a_run_trains_on_the_task_and_evaluates_it(tmp_path):
    run = config(tmp_path / "run", "decoding.max_new_tokens=20")
    run.task = ReversalConfig(num_test=8)
    summary = train(run)
    assert [stage["name"] for stage in summary["stages"]] == ["main", "head", "joint", "rl"]
    for stage in summary["stages"]:
        assert stage["num_problems"] == 8 and stage["slow_accuracy"] == pytest.approx(0, abs=1)
