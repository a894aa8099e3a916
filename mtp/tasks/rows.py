"""Problems from files: JSONL, Parquet, a folder of `datasets` or a dataset of the Hugging Face hub.

Without separate test rows, the hash of a question decides its split: copies of a question are in
one split, and rows added later move none. With test rows, training rows whose question is among
them are dropped and counted in a warning. Test problems are ordered by hash, so that the first
`num_test` of them are a fair sample.

Rows are in memory; `streamed_rows.py` reads those that do not fit there.
"""

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common.bounds import bounded
from .base import Example, Split, check_content, columns_hash, content_hash
from .reward_functions import load_reward
from .row_examples import ColumnsConfig, examples_of, first_questions, in_test_share
from .row_files import load_rows, open_rows
from .streamed_rows import StreamedRows
from .weighted_rewards import RewardedTask, WeightedRewards

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RowsConfig(ColumnsConfig):
    """Settings for `task=rows task.source=problems.jsonl task.reward=math`."""

    source: str | None = None
    """Source of the rows: a file ending in .jsonl, .jsonl.gz or .parquet, a pattern of such files
    (`data/*.jsonl`), a folder or a hub id that `datasets` opens."""
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
    stream: bool = False
    """Read the training rows as they are used, for data that does not fit into memory."""
    shuffle_rows: int = bounded(10_000, at_least=1, at_most=10_000_000)
    """Number of streamed examples that are in memory and shuffled together; 1: no shuffling."""
    shuffle_seed: int = bounded(0, at_least=0)
    """Seed of the order of streamed rows. The order of others follows from the run's seed."""
    reward: Any = "exact"
    """Reward of an answer: exact, math (equality by math-verify), `package.module:function`, or a
    list of several, whose weighted sum is the reward."""
    reward_weights: list[float] = bounded([], at_least=-1e9, at_most=1e9)
    """Weight of each function of a list; empty: 1 for each."""
    reward_style: str = "auto"
    """Signature of the functions: trl, verl, reasoning_gym; auto detects it by parameter names."""
    reward_seconds: float = bounded(10.0, above=0)
    """Time limit of a function per answer in seconds; it gives an answer that takes longer 0."""
    right_at: float = bounded(1.0, at_least=-1e9)
    """Minimum reward of a right answer."""

    def build(self) -> "Rows | StreamedRows":
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
        if self.stream:
            return self._streamed()
        return Rows(self)

    def _streamed(self) -> StreamedRows:
        test_rows = self.test_rows
        return StreamedRows(
            open_rows(*self.train_rows, streaming=True),
            self,
            self.rewards(),
            name=self.name,
            right_at=self.right_at,
            shuffle_rows=self.shuffle_rows,
            seed=self.shuffle_seed,
            test=None if test_rows is None else examples_of(load_rows(*test_rows), self),
            test_share=self.test_share,
        )

    @property
    def name(self) -> str:
        """Name of the task."""
        return f"rows/{Path(str(self.source)).name}"

    @property
    def train_rows(self) -> tuple[str, str | None, str, str]:
        """Arguments of `load_rows` for the training rows."""
        return str(self.source), self.subset, self.train_split, "task.source"

    @property
    def test_rows(self) -> tuple[str, str | None, str, str] | None:
        """Arguments of `load_rows` for the test rows; None if a share is held out."""
        if self.test_source is None and self.test_split is None:
            return None
        source, split = self.test_source or str(self.source), self.test_split or "test"
        return source, self.subset, split, "task.test_source"

    def rewards(self) -> WeightedRewards:
        """The reward functions. Raises ValueError naming the key of an impossible value."""
        paths = [self.reward] if isinstance(self.reward, str) else self.reward
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise ValueError(
                "task.reward must be exact, math, package.module:function or a list of these, got "
                f"{self.reward!r}"
            )
        functions = [load_reward(path, self.reward_style) for path in paths]
        return WeightedRewards(functions, self.reward_weights, self.reward_seconds)


class Rows(RewardedTask):
    """Problems from rows, see the module."""

    is_listed = True

    def __init__(self, config: RowsConfig):
        super().__init__(config.rewards(), config.right_at)
        self.config, self.name = config, config.name
        rows = load_rows(*config.train_rows)
        train = examples_of(rows, config)
        test_rows = config.test_rows
        if test_rows is None:
            held_out = {f for f, _ in train if in_test_share(f, config.test_share)}
            test = [pair for pair in train if pair[0] in held_out]
            hint = "change task.test_share or add rows"
        else:
            test = examples_of(load_rows(*test_rows), config)
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
        self._test = first_questions(test, config.num_test)
        for split, examples in (("train", self._train), ("test", self._test)):
            if not examples:
                raise ValueError(
                    f"task {self.name} needs at least one {split} row, got none of {len(train)}; "
                    + hint
                )

    @cached_property
    def _content(self) -> str:
        return content_hash((*self._train, *self._test))

    @cached_property
    def _columns(self) -> str:
        return columns_hash((*self._train, *self._test))

    def bookmark(self, position: int) -> dict[str, Any]:
        return {"content": self._content, "columns": self._columns}

    def restore(self, bookmark: dict[str, Any]) -> None:
        check_content(bookmark, self._content, "task.source")
        check_content(bookmark, self._columns, "task.source", "columns")

    def size(self, split: Split) -> int:
        return len(self._test if split == "test" else self._train)

    def example(self, split: Split, index: int) -> Example:
        return (self._test if split == "test" else self._train)[index]
