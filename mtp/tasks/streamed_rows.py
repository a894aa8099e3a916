"""Rows that do not fit into memory: read as they are used, shuffled in windows, without an end.

The training rows, without those that are held out, are one endless sequence: after the last row
comes the first again. It is cut into windows of `shuffle_rows` examples, each shuffled with a seed
of its own. Example i is in window i // shuffle_rows, so a position is the whole state of the data,
as everywhere: a run resumes exactly, whichever process asks, and processes need not agree on
anything. A checkpoint also has a bookmark, the place in the files where a window begins, so that
a resumed run need not read everything before it again.

`IterableDataset.shuffle` of `datasets` is not used: its `state_dict` leaves out the rows in the
buffer, which a resumed run never sees. Without shuffling its `state_dict` is exact, and is the
place in a folder or a dataset of the hub.

Test examples are in memory: those of test rows, or the first held-out ones from the beginning.
"""

import random
from collections.abc import Iterator
from typing import Any

from .base import Example, Split, check_content, content_hash, fingerprint
from .row_examples import ColumnsConfig, first_questions, in_test_share, to_examples
from .row_files import Place, RowReader, no_rows
from .weighted_rewards import RewardedTask, WeightedRewards

Pair = tuple[str, Example]
"""(hash that decides the split, example)."""


_NUM_BEGINS = 64
"""Number of windows in a bookmark; the position may be in an earlier one than the last."""


class StreamedRows(RewardedTask):
    """Problems from rows, see the module."""

    stride = 1
    """Replacements are neighbours, which are in memory."""

    def __init__(
        self,
        reader: RowReader,
        columns: ColumnsConfig,
        rewards: WeightedRewards,
        *,
        name: str,
        right_at: float,
        shuffle_rows: int,
        seed: int,
        test: list[Pair] | None,
        test_share: float,
    ):
        """test: the test examples; None: a `test_share` of the questions is held out."""
        super().__init__(rewards, right_at)
        self.name, self.columns = name, columns
        self.window_size, self.seed, self.test_share = shuffle_rows, seed, test_share
        self._reader = reader
        self._held_out = None if test is None else {key for key, _ in test}
        if test is None:
            self._test = self._first_held_out()
        else:
            self._test = first_questions(test, columns.num_test)
        if not self._test:
            raise ValueError(
                f"task {name} needs at least one test row, got none; change task.test_share or add "
                "rows"
            )
        self._begins: dict[int, Begin] = {0: Begin()}
        self._windows: dict[int, list[Example]] = {}

    def size(self, split: Split) -> int | None:
        return len(self._test) if split == "test" else None

    def example(self, split: Split, index: int) -> Example:
        if split == "test":
            return self._test[index]
        number, offset = divmod(index, self.window_size)
        return self._window(number)[offset]

    def bookmark(self, position: int) -> dict[str, Any]:
        """The beginnings of the last windows up to a position."""
        known = [n for n in sorted(self._begins) if n <= position // self.window_size]
        return {
            "files": self._reader.identity(),
            "test": content_hash(self._test),
            "window_size": self.window_size,
            "begins": [[n, vars(self._begins[n])] for n in known[-_NUM_BEGINS:]],
        }

    def restore(self, bookmark: dict[str, Any]) -> None:
        files = self._reader.identity()
        if bookmark["files"] != files:
            raise ValueError(
                f"task.source must be what it was when the run began, {bookmark['files']} (name "
                f"and size), got {files}; give those files, or overwrite=true to start anew"
            )
        check_content(bookmark, content_hash(self._test), "the rows of the test set", "test")
        if bookmark["window_size"] == self.window_size:
            self._begins |= {number: Begin(**begin) for number, begin in bookmark["begins"]}

    def _is_held_out(self, key: str) -> bool:
        if self._held_out is None:
            return in_test_share(key, self.test_share)
        return key in self._held_out

    def _first_held_out(self) -> list[Example]:
        """The first `num_test` held-out examples, each question once."""
        found: dict[str, Example] = {}
        for where, row in self._reader.rows():
            for key, example in to_examples(row, self.columns, where):
                if self._is_held_out(key):
                    found.setdefault(fingerprint(example), example)
            if len(found) >= self.columns.num_test:
                break
        return list(found.values())[: self.columns.num_test]

    def _window(self, number: int) -> list[Example]:
        """The examples of a window in their order. The last two windows are kept."""
        if number not in self._windows:
            known = max(n for n in self._begins if n <= number)
            sequence = Sequence(self, self._begins[known])
            for at in range(known, number + 1):
                examples = sequence.take(self.window_size)
                self._begins[at + 1] = sequence.begin
            while len(self._windows) > 1:
                del self._windows[next(iter(self._windows))]
            random.Random(f"{self.seed}/stream/{number}").shuffle(examples)
            self._windows[number] = examples
        return self._windows[number]

    def training_rows(self, place: Place | None) -> Iterator[list[Example]]:
        """The examples of each row from a place on, without those that are held out."""
        for where, row in self._reader.rows(place):
            pairs = to_examples(row, self.columns, where)
            yield [example for key, example in pairs if not self._is_held_out(key)]

    @property
    def place(self) -> Place:
        """The place after the row that was read last."""
        return self._reader.place


class Begin:
    """The beginning of a window within the endless sequence of rows."""

    def __init__(self, place: Place | None = None, skipped: int = 0):
        """place: before a row, None before the first; skipped: examples of that row before it."""
        self.place, self.skipped = place, skipped


class Sequence:
    """The endless sequence of training examples from a beginning on."""

    def __init__(self, rows: StreamedRows, begin: Begin):
        self.rows, self.begin = rows, begin

    def take(self, number: int) -> list[Example]:
        """The next `number` examples; `begin` moves after them.

        Raises ValueError if all rows are held out.
        """
        taken: list[Example] = []
        while True:
            before, place = len(taken), self.begin.place
            is_whole = place is None and not self.begin.skipped
            for examples in self.rows.training_rows(place):
                left = examples[self.begin.skipped :]
                room = number - len(taken)
                taken += left[:room]
                if len(left) > room:
                    self.begin = Begin(place, self.begin.skipped + room)
                    return taken
                place = self.rows.place
                self.begin = Begin(place)
                if len(taken) == number:
                    return taken
            if is_whole and len(taken) == before:
                raise no_rows(self.rows.name, "task.source")
            self.begin = Begin()
