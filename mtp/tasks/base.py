"""The interface of a task: numbered examples in two disjoint splits, and an outcome for an answer.

Data flow: a task gives `Example`s; `mtp.rollouts.prompt_format` turns them into token ids; the
sampler's text comes back to `Task.outcome`. A task knows nothing of tokens or models.
"""

import codecs
import hashlib
import math
import random
import unicodedata
from abc import ABC, abstractmethod
from asyncio import CancelledError
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common.bounds import bounded

Split = str
"""`train`, `test`, or another held-out set that the task names."""


@dataclass(frozen=True)
class Example:
    """One problem."""

    prompt: str
    answer: str
    thought: str | None = None
    """A chain of thought that leads to the answer, without delimiters; None if there is none."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Further columns, which a reward may read."""
    where: str = field(default="", compare=False)
    """Origin of the example, for errors: `row 3 of rows.jsonl`; empty: its number in the task."""


@dataclass(frozen=True)
class Step:
    """One step of a thought, as a task checks it."""

    start: int
    """Character of the thought at which the step begins."""
    end: int
    """Character after its last one."""
    is_true: bool
    """Whether the step is true by itself."""
    expected: str | None = None
    """Correct text of this step; None where the task does not know one."""


def steps_between(
    separator: str,
    thought: str,
    is_true: Callable[[str], bool],
    expected: Callable[[int, str], str | None],
) -> list[Step]:
    """The steps of a thought that a separator divides.

    An empty thought is one empty step. `expected` is given a step's number and text.
    """
    steps, start = [], 0
    for number, text in enumerate(thought.split(separator)):
        end = start + len(text)
        steps.append(Step(start, end, is_true(text), expected(number, text)))
        start = end + len(separator)
    return steps


@dataclass(kw_only=True)
class TaskConfig:
    """Settings that every task has. Each task's own config is in its file."""

    num_test: int = bounded(512, at_least=1, at_most=10_000_000)
    """Number of held-out problems for evaluations; fewer if the task has fewer."""

    def build(self) -> "Task":
        raise ValueError(
            "task must name a task; choose one of conf/task, for example task=running_sum"
        )


class Task(ABC):
    """A source of problems and the verifier of their answers."""

    name: str = ""
    """Name of the task in errors and reports."""
    right_at: float = 1.0
    """Minimum score of a right answer."""
    has_verifier: bool = True
    """False if no answer is right or wrong: accuracies are then null, and outcomes 0."""
    test_sets: tuple[Split, ...] = ("test",)
    """Held-out sets that the evaluation at a stage's end measures; `test` is the first."""
    interim_set: Split = "test"
    """Held-out set of the evaluations within a stage. Their best one is kept as a checkpoint, so a
    set apart from `test_sets` leaves those untouched by any choice."""
    is_listed: bool = False
    """True if all examples are in memory: they are checked, and counted, before a run begins."""

    @abstractmethod
    def size(self, split: Split) -> int | None:
        """Number of examples; None if it is unlimited."""

    @abstractmethod
    def example(self, split: Split, index: int) -> Example:
        """Example `index` of a split; the same one at every call."""

    def score(self, example: Example, answer: str) -> float:
        """Raw score of the final answer (extracted, stripped): 1.0 if it equals the gold one.

        Tasks override this; exceptions of their rewards may pass.
        """
        return float(same_text(answer, example.answer))

    def outcome(self, example: Example, answer: str) -> float:
        """1.0 if the final answer (extracted, stripped) is right, else 0.0.

        Raises ValueError naming the task and the sample if the score raises or is not finite.
        """
        where = f"task {self.name}, prompt {example.prompt[:80]!r}, answer {answer[:80]!r}"
        try:
            value = float(self.score(example, answer))
        # A reward that ends the process or cancels its task must not end the run silently.
        except (Exception, SystemExit, CancelledError) as error:
            raise ValueError(f"the reward raised {error!r} ({where})") from error
        if not math.isfinite(value):
            raise ValueError(f"the reward must be a finite number, got {value} ({where})")
        return float(value >= self.right_at)

    def true_steps(self, thought: str) -> tuple[int, int] | None:
        """(true steps, steps) of a thought whose steps can be verified; None if they cannot."""
        return None

    def steps(self, example: Example, thought: str) -> list[Step] | None:
        """Each step of a thought, for the report; None where steps cannot be checked.

        The share of true ones is that of `true_steps`.
        """
        return None

    def paraphrase(self, example: Example, thought: str) -> str | None:
        """Another wording of a thought with the same meaning; None where there is none.

        For measurements only: it may not be used in training.
        """
        return None

    def continued_answer(self, example: Example, thought: str) -> str | None:
        """The answer that the beginning of a thought leads to if all later steps are right.

        The thought may hold a mistake, which later steps then build on. It ends after a number.
        None where this is unknown. For measurements only: it may not be used in training.
        """
        return None


def same_text(first: str, second: str) -> bool:
    """True if two texts are equal except for white space around them and Unicode's form (NFC)."""
    a, b = (unicodedata.normalize("NFC", text.strip()) for text in (first, second))
    return a == b


def read_utf8(path: Path, key: str) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises ValueError naming the config's `key`, the file and the line if it is another encoding.
    """
    data = path.read_bytes()
    where, encoding = str(path), "ISO-8859-1"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        encoding = "UTF-16"
    else:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            number = data.count(b"\n", 0, error.start) + 1
            where = f"{path}, line {number}"
    raise ValueError(
        f"{key} must be UTF-8 text, got {where}; if it is {encoding}, convert it: "
        f"iconv -f {encoding} -t UTF-8"
    )


def fingerprint(example: Example) -> str:
    """A hash of the question, used to check that splits are disjoint."""
    return hashlib.sha256(example.prompt.encode()).hexdigest()[:16]


def held_out_sets(task: Task) -> list[Split]:
    """Names of the held-out sets of a task, each once."""
    return list(dict.fromkeys((*task.test_sets, task.interim_set)))


def check_disjoint(task: Task, num_train: int = 2048) -> None:
    """Raise ValueError if a held-out question is among the first `num_train` training questions,
    or in two held-out sets.
    """
    held_out = held_out_sets(task)
    sizes = {split: task.size(split) for split in ("train", *held_out)}
    for split, size in sizes.items():
        if size == 0:
            raise ValueError(f"task {task.name} has no {split} examples; it needs at least one")
    limit = min(num_train, sizes["train"] or num_train)
    seen = {fingerprint(task.example("train", i)): "training" for i in range(limit)}
    for split in held_out:
        for i in range(min(num_train, sizes[split] or num_train)):
            example = task.example(split, i)
            other = seen.setdefault(fingerprint(example), split)
            if other != split:
                raise ValueError(
                    f"task {task.name}: {split} problem {i} is also a {other} problem "
                    f"({example.prompt[:80]!r}); the splits must be disjoint"
                )


@lru_cache(maxsize=2)
def _epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def training_index(position: int, size: int | None, seed: int) -> int:
    """Index of the `position`-th training example of a run.

    Counted up if the number of examples is unlimited, else a new order every epoch. A position is
    the whole state of the data, so a run resumes exactly.
    """
    if size is None:
        return position
    epoch, offset = divmod(position, size)
    return _epoch_order(size, seed, epoch)[offset]
