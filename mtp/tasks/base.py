"""The interface of a task: numbered examples in two disjoint splits, and an outcome for an answer.

Data flow: a task gives `Example`s; `mtp.rollouts.prompt_format` turns them into token ids; the
sampler's text comes back to `Task.outcome`. A task knows nothing of tokens or models.
"""

import codecs
import hashlib
import json
import math
import random
import unicodedata
from abc import ABC, abstractmethod
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common.bounds import bounded

Split = str
"""`train`, `test`, or another held-out set that the task names."""

Message = dict[str, str]
"""One message of a conversation: `role` (system, user or assistant) and `content`."""


@dataclass(frozen=True)
class Example:
    """One problem."""

    prompt: str
    """Text of the question; of a conversation, its last message, the user's."""
    answer: str
    thought: str | None = None
    """A chain of thought that leads to the answer, without delimiters; None if there is none."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Further columns, which a reward may read."""
    where: str = field(default="", compare=False)
    """Origin of the example, for errors: `row 3 of rows.jsonl`; empty: its number in the task."""
    messages: tuple[Message, ...] = ()
    """The whole prompt as messages, the last of which is the user's `prompt`; empty for a prompt
    that was given as text."""
    project: str = ""
    """Name of the project that the problem belongs to, unique in a split; empty: none."""
    place: int = 0
    """Number of the problem in its project, from 0. A later problem may need what an earlier one
    showed, see `decoding.segments.memory_scope`."""
    memory: str = ""
    """Text of the memory file in which the *solved* problem begins, as the solved problems before
    it leave it. Rollouts begin with what was really written."""
    note: str = ""
    """Commands that the first summary of the solved problem writes besides its progress: what the
    project should remember."""

    @property
    def conversation(self) -> list[Message]:
        """The whole prompt as messages, also for a prompt that was given as text."""
        return list(self.messages) or [{"role": "user", "content": self.prompt}]

    @property
    def has_context(self) -> bool:
        """True if messages come before the prompt: a system message or earlier turns."""
        return len(self.messages) > 1

    @property
    def shown(self) -> str:
        """The whole prompt as text, for reports: earlier messages after their roles."""
        if not self.has_context:
            return self.prompt
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


@dataclass(frozen=True)
class Attempt:
    """A final answer to a problem."""

    example: Example
    answer: str
    """The final answer, extracted and stripped."""
    completion_ids: list[int] | None = None
    """Token ids of the whole completion, the thought included; None where they are not known."""


@dataclass(frozen=True)
class Scored:
    """The score of an attempt, and what the functions that gave it had to report."""

    score: float
    outcome: float = 0.0
    """1.0 if the score is that of a right answer, else 0.0."""
    parts: dict[str, float | None] = field(default_factory=dict)
    """Value of each reward function by its name; None where it does not apply."""
    metrics: list[tuple[str, float]] = field(default_factory=list)
    """(name, value) that the functions logged."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Columns that the functions logged for this attempt."""


@dataclass(frozen=True)
class RunState:
    """Position of a run, as a reward may read it."""

    global_step: int = 0
    """Optimizer steps done."""
    max_steps: int = 0
    """Optimizer steps of the whole run; 0 outside of a run."""
    epoch: float | None = None
    """Number of times that the training examples were used; None if they are unlimited."""


class RewardError(Exception):
    """An error that a reward raised, with the attempt that it was given."""

    def __init__(self, attempt: Attempt, error: BaseException):
        super().__init__(repr(error))
        self.attempt, self.error = attempt, error


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
    """Size of the held-out set; smaller if the task has fewer problems. A task that makes problems
    without end (`running_sum`, `graph_search`, `pointer_chasing`, `continuation`) has no such limit
    and does not read it."""

    def build(self) -> "Task":
        raise ValueError(
            "task must name a task; choose one of conf/task, for example task=running_sum"
        )


NUM_FIRST = 8
"""Number of examples of a split by which a resumed run knows its data again."""


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
    stride: int = 7919
    """Distance from a training problem that cannot be used to the next candidate: a prime, since
    neighbours may be alike."""
    is_listed: bool = False
    """True if all examples are in memory: they are checked, and counted, before a run begins."""
    project_size: int = 1
    """Number of problems per project. Those with indices n * project_size and above are the places
    0, 1, ... of project n. 1: there are no projects."""

    run_state: Callable[[], RunState] = RunState
    """Returns the run's position."""

    def bookmark(self, position: int) -> dict[str, Any]:
        """State with which a resumed run finds a position sooner, and sees that the data is the
        same, as plain values.
        """
        del position
        return {"first": self._first_content()}

    def restore(self, bookmark: dict[str, Any]) -> None:
        """Use the bookmark of an earlier process. Raises ValueError if the data has changed."""
        check_content(bookmark, self._first_content(), "task, with the packages it uses,", "first")

    def _first_content(self) -> str:
        """Hash of the first examples of each split: another version of a generator shows there."""
        splits: tuple[Split, ...] = ("train", "test")
        numbers = {split: min(self.size(split) or NUM_FIRST, NUM_FIRST) for split in splits}
        return content_hash(self.example(s, i) for s in splits for i in range(numbers[s]))

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

    def scores(self, attempts: Sequence[Attempt]) -> list[Scored]:
        """Raw scores of attempts. Tasks whose rewards run together override this, else `score`.

        Raises RewardError for an attempt that cannot be scored.
        """
        scored = []
        for attempt in attempts:
            try:
                scored.append(Scored(float(self.score(attempt.example, attempt.answer))))
            # A reward that ends the process or cancels its task must not end the run silently.
            except (Exception, SystemExit, CancelledError) as error:
                raise RewardError(attempt, error) from error
        return scored

    def scored(self, attempts: Sequence[Attempt]) -> list[Scored]:
        """Scores and outcomes of attempts.

        Raises ValueError naming the task and the sample if a score raises or is not finite.
        """
        try:
            found = self.scores(attempts)
        except RewardError as failed:
            where = self._where(failed.attempt)
            raise ValueError(f"the reward raised {failed.error!r} ({where})") from failed.error
        for attempt, one in zip(attempts, found, strict=True):
            if not math.isfinite(one.score):
                raise ValueError(
                    f"the reward must be a finite number, got {one.score} ({self._where(attempt)})"
                )
        # Parts that sum to `right_at` may fall short of it by rounding.
        least = self.right_at - 1e-9 * max(1.0, abs(self.right_at))
        return [replace(one, outcome=float(one.score >= least)) for one in found]

    def outcome(
        self, example: Example, answer: str, completion_ids: list[int] | None = None
    ) -> float:
        """1.0 if the final answer (extracted, stripped) is right, else 0.0.

        Raises ValueError naming the task and the sample if the score raises or is not finite.
        """
        return self.scored([Attempt(example, answer, completion_ids)])[0].outcome

    def follow(self, state: Callable[[], RunState]) -> None:
        """Give the task a function that returns the run's position, for rewards that read it."""
        self.run_state = state

    def _where(self, attempt: Attempt) -> str:
        prompt, answer = attempt.example.prompt[:80], attempt.answer[:80]
        return f"task {self.name}, prompt {prompt!r}, answer {answer!r}"

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
    if begins_as_utf16(data[:4]):
        raise not_utf8(key, str(path), "UTF-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise not_utf8(key, f"{path}, line {number}", "ISO-8859-1") from None


def begins_as_utf16(first: bytes) -> bool:
    """True if a file whose first four bytes these are is UTF-16."""
    return first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in first


def not_utf8(key: str, where: str, encoding: str) -> ValueError:
    """The error of a text that is not UTF-8, with the encoding that it may have."""
    return ValueError(
        f"{key} must be UTF-8 text, got {where}; if it is {encoding}, convert it: "
        f"iconv -f {encoding} -t UTF-8"
    )


def content_hash(examples: Iterable[Example]) -> str:
    """A hash of questions, answers and thoughts in their order."""
    hashed = hashlib.sha256()
    for example in examples:
        hashed.update(json.dumps([example.conversation, example.answer, example.thought]).encode())
    return hashed.hexdigest()[:16]


def columns_hash(examples: Iterable[Example]) -> str:
    """A hash of the further columns, which rewards read, in their order."""
    hashed = hashlib.sha256()
    for example in examples:
        hashed.update(json.dumps(example.columns, default=str, sort_keys=True).encode())
    return hashed.hexdigest()[:16]


def check_content(bookmark: dict[str, Any], found: str, key: str, name: str = "content") -> None:
    """Raises ValueError naming the config's `key` if a resumed run has other data than before.

    name: entry of the bookmark; earlier versions did not write all of them.
    """
    noted = bookmark.get(name, found)
    if noted != found:
        raise ValueError(
            f"{key} must hold what it held when the run began: its hash was {noted} and is "
            f"{found}; give that data, or overwrite=true to start anew"
        )


def fingerprint(example: Example) -> str:
    """A hash of the question with its context, used to check that splits are disjoint.

    Two forms of the same Unicode text have one hash.

    The context of a later problem of a project is what the project should remember.
    """
    question = example.prompt
    if example.has_context:
        question = json.dumps([[m["role"], m["content"]] for m in example.messages])
    if example.memory:
        question = json.dumps([question, example.memory])
    return hashlib.sha256(unicodedata.normalize("NFC", question).encode()).hexdigest()[:16]


def first_examples(task: Task, number: int) -> Iterator[Example]:
    """The first `number` training problems, or all if there are fewer."""
    size = task.size("train")
    for index in range(number if size is None else min(size, number)):
        yield task.example("train", index)


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
    seen = {fingerprint(example): "training" for example in first_examples(task, num_train)}
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


def training_index(position: int, size: int | None, seed: int, project_size: int = 1) -> int:
    """Index of the `position`-th training example of a run.

    Counted up if the number of examples is unlimited, else a new order every epoch, in which the
    problems of a project follow each other. A position is the whole state of the data, so a run
    resumes exactly.
    """
    if size is None:
        return position
    epoch, offset = divmod(position, size)
    project, place = divmod(offset, project_size)
    return _epoch_order(size // project_size, seed, epoch)[project] * project_size + place
