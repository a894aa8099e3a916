"""Any dataset of reasoning-gym, with its own scorer, in two disjoint splits.

Item i of a dataset is generated with `Random(seed + i)`, so two seeds share most of their items.
The splits are therefore index ranges of one seed. Test items come first, training items after them,
and a training item whose question is also a test question is replaced by another one.

An answer is right if the dataset's scorer gives exactly 1.0: scorers give 0.01 to 0.05 to wrong
answers and part of the score to answers that contain the right one. A scorer that raises on an
answer could not read it, which counts as 0.

Left out: datasets without a gold answer, two that are not reproducible, and the curricula of
reasoning-gym.
"""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..common.bounds import bounded
from .base import Example, Split, Step, Task, TaskConfig, fingerprint, steps_between
from .solvers import SOLVERS, true_steps

_UNSTABLE = {"codeio", "list_functions"}
"""Datasets whose item i differs between calls: their generators use the global random state."""
_HASH_ORDERED = {
    "isomorphic_strings",
    "knight_swap",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
}
"""Datasets whose item i depends on the order of sets, which PYTHONHASHSEED fixes."""
_NONSENSE = "qwx zvk"
_NUM_CHECKED = 16
"""Number of items whose gold answer must score 1.0 before a run begins."""
_NUM_PROBES = 64
_STRIDE = 7919
"""Distance from a training item that may not be used to the next candidate; a prime."""


@dataclass(kw_only=True)
class ReasoningGymConfig(TaskConfig):
    """Settings for `task=reasoning_gym task.dataset=leg_counting task.options={max_animals: 4}`."""

    dataset: str = ""
    """Name of the dataset in reasoning-gym."""
    options: Any = None
    """Fields of the dataset's own config, without seed and size; None: its defaults. Not typed as a
    mapping, which could not be given whole on the command line."""
    seed: int = bounded(0, at_least=0, at_most=2**63 - 1)
    """Seed of the items; the splits are ranges of their numbers."""
    num_train: int = bounded(100_000, at_least=1)
    """Number of training items; some datasets generate all of theirs at once, or allow at most
    20000."""
    thoughts: bool = False
    """Refuse a dataset without a solver in mtp/tasks/solvers.py. With a solver, its chains of
    thought are given in any case."""

    def build(self) -> "ReasoningGym":
        for key in ("num_test", "num_train"):
            if getattr(self, key) < 1:
                raise ValueError(f"task.{key} must be at least 1, got {getattr(self, key)}")
        if not isinstance(self.options, dict | None):
            raise ValueError(
                f"task.options must be a mapping such as {{min_value: 10}}, got {self.options!r}"
            )
        if self.thoughts and self.dataset not in SOLVERS:
            raise ValueError(
                f"task.thoughts needs a dataset with a solver, one of {sorted(SOLVERS)}, got "
                f"{self.dataset!r}; set task.thoughts=false or add a solver to mtp/tasks/solvers.py"
            )
        return ReasoningGym(self)


class ReasoningGym(Task):
    """A dataset of reasoning-gym, see the module. Examples keep the whole item in the column
    `entry`.
    """

    def __init__(self, config: ReasoningGymConfig):
        self.config = config
        self.name = f"reasoning_gym/{config.dataset}"
        self._dataset = create(config)
        self._solver = SOLVERS.get(config.dataset)
        self._test: dict[str, Example] = {}
        for index in range(config.num_test):
            example = self._at(index)
            self._test.setdefault(fingerprint(example), example)
        self._tests = list(self._test.values())
        for example in self._tests[:_NUM_CHECKED]:
            self._check_scorer(example)

    def size(self, split: Split) -> int:
        """Number of examples. Test questions are distinct: there may be fewer than `num_test`."""
        return len(self._tests) if split == "test" else self.config.num_train

    def example(self, split: Split, index: int) -> Example:
        """Raises ValueError if nearly every question is a test question."""
        if split == "test":
            return self._tests[index]
        for probe in range(_NUM_PROBES):
            at = (index + probe * _STRIDE) % self.config.num_train
            example = self._at(self.config.num_test + at)
            if fingerprint(example) not in self._test:
                return example
        raise ValueError(
            f"task {self.name} has too few different questions to keep {len(self._tests)} of them "
            "for tests; lower task.num_test or widen task.options"
        )

    def score(self, example: Example, answer: str) -> float:
        """The dataset's own score, 0..1."""
        return read_score(self._dataset.score_answer, answer, example.columns["entry"])

    def true_steps(self, thought: str) -> tuple[int, int] | None:
        if self._solver is None or self._solver.is_true is None:
            return None
        return true_steps(thought, self._solver.is_true)

    def steps(self, example: Example, thought: str) -> list[Step] | None:
        solver = self._solver
        if solver is None or solver.is_true is None:
            return None
        corrected = solver.corrected or (lambda step: None)
        return steps_between(";", thought, solver.is_true, lambda _, step: corrected(step))

    def _at(self, index: int) -> Example:
        try:
            entry = self._dataset[index]
        except Exception as error:
            raise ValueError(
                f"task.dataset={self.config.dataset} failed to generate item {index}: {error!r}; "
                "change task.options, or lower task.num_train"
            ) from error
        if not isinstance(entry["answer"], str):
            raise ValueError(
                f"task.dataset must be one with gold answers, but the answer of {self.name} item "
                f"{index} is {entry['answer']!r}; choose another dataset"
            )
        try:
            thought = None if self._solver is None else self._solver.think(entry)
        except ValueError as error:
            raise ValueError(
                f"the gold answer of {self.name} item {index} does not follow from its question "
                f"{entry['question'].strip()[-80:]!r}: {error}; change task.options (for "
                "basic_arithmetic set allow_parentheses=true or leave / out of operators)"
            ) from None
        return Example(entry["question"].strip(), entry["answer"], thought, {"entry": entry})

    def _check_scorer(self, example: Example) -> None:
        gold, nonsense = self.score(example, example.answer), self.score(example, _NONSENSE)
        if gold != 1.0:
            raise ValueError(
                f"the scorer of {self.name} gives its own gold answer {example.answer[:80]!r} "
                f"{gold}, expected 1.0; choose another dataset or other task.options"
            )
        if nonsense == 1.0:
            raise ValueError(
                f"the scorer of {self.name} takes {_NONSENSE!r} for a right answer; choose another "
                "dataset"
            )


def read_score(scorer: Callable[[str, Any], Any], answer: str, entry: dict[str, Any]) -> float:
    """The score of an answer; 0 if the scorer raises, which it does on answers it cannot read."""
    try:
        return float(scorer(answer, entry))
    except Exception:  # any kind: each dataset fails in its own way
        return 0.0


def create(config: ReasoningGymConfig) -> Any:
    """The dataset. Raises ValueError for an unknown name or options that do not fit it."""
    from reasoning_gym.factory import DATASETS, create_dataset

    if config.dataset not in DATASETS:
        close = difflib.get_close_matches(config.dataset, DATASETS, n=5, cutoff=0.4)
        raise ValueError(
            f"task.dataset must be a reasoning-gym dataset, got {config.dataset!r}; close to it: "
            f"{close or sorted(DATASETS)}"
        )
    if config.dataset in _UNSTABLE:
        raise ValueError(
            f"task.dataset must give the same item at every call, but {config.dataset} does not; "
            "choose another dataset"
        )
    if config.dataset in _HASH_ORDERED and not os.environ.get("PYTHONHASHSEED", "").isdigit():
        raise ValueError(
            f"the items of task.dataset={config.dataset} depend on Python's hash seed, which is "
            "random; start with PYTHONHASHSEED=0 in the environment"
        )
    options = config.options or {}
    known = {f.name for f in fields(DATASETS[config.dataset][1])} - {"seed", "size"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"task.options of {config.dataset} must be among {sorted(known)}, got {unknown}"
            + ("; use task.seed and task.num_train" if {"seed", "size"} & set(unknown) else "")
        )
    size = config.num_test + config.num_train
    try:
        return create_dataset(config.dataset, **options, seed=config.seed, size=size)
    except Exception as error:  # asserts, ValueErrors and TypeErrors, by dataset
        raise ValueError(
            f"task.options={options}, task.num_train={config.num_train} do not fit "
            f"{config.dataset}: {error!r}"
        ) from error
