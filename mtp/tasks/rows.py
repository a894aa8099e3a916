"""Problems from files: JSONL, Parquet, a folder of `datasets` or a dataset of the Hugging Face hub.

Without separate test rows, the hash of a question decides its split: copies of a question are in
one split, and rows added later move none. With test rows, training rows whose question is among
them are dropped and counted in a warning. Test problems are ordered by hash, so that the first
`num_test` of them are a fair sample.

Rows are in memory; `streamed_rows.py` reads those that do not fit there.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.bounds import bounded
from .base import Example, Split, Task
from .reward_functions import load_reward
from .row_examples import ColumnsConfig, to_examples
from .row_files import load_rows

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
    reward: str = "exact"
    """Reward of an answer: exact, math (equality by math-verify) or `package.module:function`."""
    reward_style: str = "auto"
    """Signature of that function: trl, verl, reasoning_gym; auto detects it by parameter names."""
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


class Rows(Task):
    """Problems from rows, see the module."""

    def __init__(self, config: RowsConfig):
        assert config.source is not None
        self.config = config
        self.is_listed = True
        self.name = f"rows/{Path(config.source).name}"
        self.right_at = config.right_at
        self._reward = load_reward(config.reward, config.reward_style, config.reward_seconds)
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
        return self._reward(example, answer)

    def _examples(self, rows: Sequence[dict[str, Any]], source: str) -> list[tuple[str, Example]]:
        """(hash that decides the split, example) of every row."""
        return [
            pair
            for index, row in enumerate(rows)
            for pair in to_examples(row, self.config, f"row {index} of {source}")
        ]


def in_test_share(question_hash: str, share: float) -> bool:
    """True if a question, by its hexadecimal hash, is in the held-out share."""
    return int(question_hash[:13], 16) < share * 16**13
