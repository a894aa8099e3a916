"""Sums of a few two-digit numbers, every step written out: `37+85+46=`, `37+85=122;122+46=168`.

Small enough for a model of a million parameters, and every step of a thought can be verified. The
hash of a question decides its split, so the splits are disjoint by construction.
"""

import hashlib
import random
import re
from dataclasses import dataclass

from ..common.bounds import bounded
from .base import Example, Split, Step, Task, TaskConfig, steps_between

_STEP = re.compile(r"(\d+)\+(\d+)=(\d+)")
_BEGUN = re.compile(r"(\d+)(?:\+(\d+))?(?:=(\d+))?")
"""A step up to one of its three numbers."""
_TEST_SHARE = 16
"""One question in this many is a test question."""


@dataclass(kw_only=True)
class RunningSumConfig(TaskConfig):
    """Settings for `task=running_sum`."""

    num_terms: int = bounded(3, at_least=2, at_most=1000)
    """Number of terms of a sum."""
    low: int = bounded(10, at_least=0)
    """Smallest term."""
    high: int = bounded(99, at_least=0)
    """Largest term; terms are sampled uniformly from low..high."""
    num_train: int = bounded(0, at_least=0)
    """Number of training problems, which repeat every epoch; 0: no limit."""
    seed: int = bounded(0, at_least=0, at_most=2**63 - 1)
    """Seed of the examples; the splits do not depend on it."""

    def build(self) -> "RunningSum":
        if self.num_terms < 2:
            raise ValueError(f"task.num_terms must be at least 2, got {self.num_terms}")
        if not 0 <= self.low <= self.high:
            raise ValueError(
                f"task.low and task.high must satisfy 0 <= low <= high, got {self.low}, {self.high}"
            )
        if (self.high - self.low + 1) ** self.num_terms < 64 * _TEST_SHARE:
            raise ValueError(
                f"task.low={self.low}, task.high={self.high} leave too few questions to split; "
                "widen the range or add terms"
            )
        return RunningSum(self)


class RunningSum(Task):
    """Sums with every step written out, see the module."""

    name = "running_sum"
    alphabet = "0123456789+=;"
    """Characters of prompts, thoughts and answers."""

    def __init__(self, config: RunningSumConfig):
        self.config = config

    def size(self, split: Split) -> int | None:
        return self.config.num_train or None if split == "train" else None

    def example(self, split: Split, index: int) -> Example:
        config = self.config
        rng = random.Random(f"{config.seed}/{split}/{index}")
        while True:
            terms = [rng.randint(config.low, config.high) for _ in range(config.num_terms)]
            prompt = "+".join(map(str, terms)) + "="
            bucket = hashlib.sha256(prompt.encode()).digest()[0] % _TEST_SHARE
            if (bucket == 0) == (split == "test"):
                break
        total, steps = terms[0], []
        for term in terms[1:]:
            steps.append(f"{total}+{term}={total + term}")
            total += term
        return Example(prompt, str(total), ";".join(steps))

    def true_steps(self, thought: str) -> tuple[int, int]:
        """Steps are separated by `;`; one is true if it reads a+b=c and a + b is c."""
        steps = thought.split(";")
        return sum(map(step_is_true, steps)), len(steps)

    def steps(self, example: Example, thought: str) -> list[Step]:
        """The steps, each with that of the solver at its place."""
        solved = [] if example.thought is None else example.thought.split(";")

        def expected(number: int, text: str) -> str | None:
            return solved[number] if number < len(solved) else None

        return steps_between(";", thought, step_is_true, expected)

    def paraphrase(self, example: Example, thought: str) -> str | None:
        """The same steps with their terms exchanged: `37+85=122` -> `85+37=122`."""
        commuted = _STEP.sub(r"\2+\1=\3", thought)
        return None if commuted == thought else commuted

    def continued_answer(self, example: Example, thought: str) -> str | None:
        """The last step as far as it is written, plus the terms that it does not hold yet.

        `37+85=122;122+4` of `37+85+46=` leads to 126, `37+85=132` to 178.
        """
        *complete, last = thought.split(";")
        match = _BEGUN.fullmatch(last)
        terms = example.prompt.removesuffix("=").split("+")
        if match is None or len(complete) > len(terms) - 2:
            return None
        first, second, result = match.groups()
        if result is not None and second is None:
            return None
        used = len(complete) + (1 if second is None else 2)
        begun = int(result) if result is not None else int(first) + int(second or 0)
        return str(begun + sum(map(int, terms[used:])))


def step_is_true(step: str) -> bool:
    """Whether a step reads `a+b=c` and a + b is c."""
    match = _STEP.fullmatch(step)
    return match is not None and int(match[1]) + int(match[2]) == int(match[3])
