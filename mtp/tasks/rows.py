"""Problems from files: JSONL, Parquet, a folder of `datasets` or a dataset of the Hugging Face hub.

Without separate test rows, the hash of a question decides its split: copies of a question are in
one split, and rows added later move none. With test rows, training rows whose question is among
them are dropped and counted in a warning. Test problems are ordered by hash, so that the first
`num_test` of them are a fair sample.

Rows are in memory; `streamed_rows.py` reads those that do not fit there.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.bounds import bounded
from .base import Attempt, Example, RunState, Scored, Split, Task, fingerprint
from .reward_functions import load_reward
from .row_examples import ColumnsConfig, to_examples
from .row_files import load_rows
from .weighted_rewards import WeightedRewards

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RowsConfig(ColumnsConfig):
    """Settings for `task=rows task.source=problems.jsonl task.reward=math`."""

    source: str | None = None
    """Source of the rows: a file ending in .jsonl or .parquet, a folder or a hub id that `datasets`
    opens."""
    subset: str | None = None
    """Configuration of a hub id or folder, such as `main` of gsm8k."""
    train_split: str = "train"
    """Training split of a hub id or folder."""
    test_source: str | None = None
    """Source of test rows; None: the rows of `test_split`, else a held-out share of the rows."""
    test_split: str | None = None
    """Test split of a hub id or folder; without `test_source`, a split of `source`."""
    test_share: float = bounded(0.1, above=0, below=1)
    """Share of the questions that is held out if there are no test rows."""
    reward: Any = "exact"
    """Reward of an answer: exact, math (equality by math-verify), `package.module:function`, or a
    list of several, whose weighted sum is the reward."""
    reward_weights: list[float] = bounded([])
    """Weight of each function of a list; empty: 1 for each."""
    reward_style: str = "auto"
    """Signature of the functions: trl, verl, reasoning_gym; auto detects it by parameter names."""
    reward_seconds: float = bounded(10.0, above=0)
    """Time limit of that function per answer in seconds; an answer that takes longer is worth 0."""
    right_at: float = bounded(1.0, at_least=-1e9)
    """Minimum reward of a right answer."""

    def build(self) -> "Rows":
        if not self.source:
            raise ValueError(
                "task.source must be a .jsonl or .parquet file, a folder or a hub id, got "
                f"{self.source!r}"
            )
        self.check_columns()
        if not 0 < self.test_share < 1:
            raise ValueError(f"task.test_share must be between 0 and 1, got {self.test_share}")
        if self.num_test < 1:
            raise ValueError(f"task.num_test must be at least 1, got {self.num_test}")
        if not math.isfinite(self.right_at):
            raise ValueError(f"task.right_at must be a finite number, got {self.right_at}")
        return Rows(self)

    def rewards(self, state: Callable[[], RunState]) -> WeightedRewards:
        """The reward functions; state: returns the run's position.

        Raises ValueError naming the key of an impossible value.
        """
        paths = [self.reward] if isinstance(self.reward, str) else self.reward
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise ValueError(
                "task.reward must be exact, math, package.module:function or a list of these, got "
                f"{self.reward!r}"
            )
        functions = [load_reward(path, self.reward_style) for path in paths]
        return WeightedRewards(functions, self.reward_weights, self.reward_seconds, state)


class Rows(Task):
    """Problems from rows, see the module."""

    def __init__(self, config: RowsConfig):
        assert config.source is not None
        self.config = config
        self.is_listed = True
        self.name = f"rows/{Path(config.source).name}"
        self.right_at = config.right_at
        self._rewards = config.rewards(lambda: self.run_state())
        self._outcomes: dict[tuple[str, str, str], float] = {}
        rows = load_rows(config.source, config.subset, config.train_split, "task.source")
        train = self._examples(rows, config.source)
        if config.test_source is None and config.test_split is None:
            held_out = {f for f, _ in train if in_test_share(f, config.test_share)}
            test = [pair for pair in train if pair[0] in held_out]
            hint = "change task.test_share or add rows"
        else:
            source = config.test_source or config.source
            split = config.test_split or "test"
            rows = load_rows(source, config.subset, split, "task.test_source")
            test = self._examples(rows, source)
            held_out = {f for f, _ in test}
            hint = "give other test rows"
            dropped = sum(f in held_out for f, _ in train)
            if dropped:
                _log.warning(
                    "%s: dropped %d of %d training rows whose question is in the test rows",
                    self.name,
                    dropped,
                    len(train),
                )
        self._train = [example for f, example in train if f not in held_out]
        self._test = [example for _, example in sorted(test, key=lambda pair: pair[0])]
        self._test = self._test[: config.num_test]
        for split, examples in (("train", self._train), ("test", self._test)):
            if not examples:
                raise ValueError(
                    f"task {self.name} needs at least one {split} row, got none of {len(train)}; "
                    + hint
                )

    def size(self, split: Split) -> int:
        return len(self._test if split == "test" else self._train)

    def example(self, split: Split, index: int) -> Example:
        return (self._test if split == "test" else self._train)[index]

    def score(self, example: Example, answer: str) -> float:
        """The reward's value."""
        return self.scores([Attempt(example, answer)])[0].score

    def scores(self, attempts: Sequence[Attempt]) -> list[Scored]:
        """Scores of attempts, whose rewards run together."""
        return self._rewards(attempts)

    def scored(self, attempts: Sequence[Attempt]) -> list[Scored]:
        found = super().scored(attempts)
        for attempt, one in zip(attempts, found, strict=True):
            self._outcomes[_key(attempt.example, attempt.answer)] = one.outcome
        for key in list(self._outcomes)[:-_NUM_OUTCOMES]:
            del self._outcomes[key]
        return found

    def outcome(
        self, example: Example, answer: str, completion_ids: list[int] | None = None
    ) -> float:
        """The outcome of the batch that the answer was last scored in, else a new one.

        Reports show single answers of an evaluation, and a reward may be a request to a server.
        """
        known = self._outcomes.get(_key(example, answer))
        return super().outcome(example, answer, completion_ids) if known is None else known

    def _examples(self, rows: Sequence[dict[str, Any]], source: str) -> list[tuple[str, Example]]:
        """(hash that decides the split, example) of every row."""
        return [
            pair
            for index, row in enumerate(rows)
            for pair in to_examples(row, self.config, f"row {index} of {source}")
        ]


_NUM_OUTCOMES = 100_000
"""Number of outcomes that are kept for reports."""


def _key(example: Example, answer: str) -> tuple[str, str, str]:
    return fingerprint(example), example.answer, answer


def in_test_share(question_hash: str, share: float) -> bool:
    """True if a question, by its hexadecimal hash, is in the held-out share."""
    return int(question_hash[:13], 16) < share * 16**13
