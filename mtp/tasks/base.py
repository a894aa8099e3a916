"""What a task is: numbered examples in two disjoint splits, and an outcome for an answer.

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
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..bounds import bounded

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
    """Whatever else a reward may want to see."""
    where: str = field(default="", compare=False)
    """Where it is from, for errors: `row 3 of rows.jsonl`; empty: its number in the task."""


@dataclass(kw_only=True)
class TaskConfig:
    """Settings that every task has. Each task's own config lives beside it."""

    num_test: int = bounded(512, at_least=1, at_most=10_000_000)
    """Held-out problems that evaluations use, at most what the task has."""

    def build(self) -> "Task":
        raise ValueError("task must name a task; choose one of conf/task, as in task=running_sum")


class Task(ABC):
    """A source of problems and the judge of their answers."""

    name: str = ""
    """What errors and reports call it."""
    right_at: float = 1.0
    """An answer is right if its score is at least this."""
    judges: bool = True
    """False where no answer is right or wrong: accuracies are null then, and outcomes 0."""
    test_sets: tuple[Split, ...] = ("test",)
    """Held-out sets that the evaluation at a stage's end measures; `test` is the first."""
    interim_set: Split = "test"
    """Held-out set of the evaluations within a stage. Their best one is kept as a checkpoint, so a
    set apart from `test_sets` leaves those untouched by any choice."""
    is_listed: bool = False
    """True where all examples are in memory: they are checked, and counted, before a run begins."""

    @abstractmethod
    def size(self, split: Split) -> int | None:
        """Number of examples; None if there is no end of them."""

    @abstractmethod
    def example(self, split: Split, index: int) -> Example:
        """Example `index` of a split; the same one at every call."""

    def score(self, example: Example, answer: str) -> float:
        """Raw score of the final answer (extracted, stripped): 1.0 if it equals the gold one.

        A task overrides this, and lets what its reward raises pass.
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
        """(true steps, steps) of a thought whose steps can be checked; None if they cannot."""
        return None


def same_text(first: str, second: str) -> bool:
    """Whether two texts are equal but for white space around them and Unicode's form (NFC)."""
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
    """A hash of the question, by which splits are checked to be disjoint."""
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

    Counted up where there is no end of examples, else a new order every epoch. A position is all
    the state that the data has, so a run resumes exactly.
    """
    if size is None:
        return position
    epoch, offset = divmod(position, size)
    return _epoch_order(size, seed, epoch)[offset]
