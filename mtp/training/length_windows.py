"""Steps of examples of similar length, so that little of a batch is padding.

The training examples are divided into windows of several steps. Within a window they are sorted by
their number of tokens and cut into steps, whose order is shuffled. A window is a permutation of its
own positions: every example is used as often as without windows, a position stays the whole state
of the data, and nothing depends on the number of processes.

Packing several texts into one row would save the rest of the padding. It is left out: anchors and
positions are those of one text per row.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..tasks.base import Example

Get = Callable[[int], Example]
"""Position in the run's data -> training example."""


def window_order(lengths: Sequence[int], batch_size: int, seed: str) -> list[int]:
    """Indices of a window's examples in the order of their use: batches of similar length.

    The shorter batch of a window that batches do not divide has the longest examples.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    batches = [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
    random.Random(seed).shuffle(batches)
    return [index for batch in batches for index in batch]


@dataclass
class LengthWindows:
    """The windows of a run's data; the last two are kept."""

    length: Callable[[Example], int]
    """Number of tokens of an example."""
    seed: int
    _kept: dict[tuple[int, int, int], list[Example]] = field(default_factory=dict)

    def examples(
        self, positions: Sequence[int], batch_size: int, steps: int, get: Get
    ) -> list[Example]:
        """The example at each position, in windows of `steps` batches of `batch_size`."""
        size = batch_size * steps
        return [
            self._window(position // size, batch_size, steps, get)[position % size]
            for position in positions
        ]

    def _window(self, number: int, batch_size: int, steps: int, get: Get) -> list[Example]:
        key = (number, batch_size, steps)
        if key not in self._kept:
            size = batch_size * steps
            examples = [get(number * size + offset) for offset in range(size)]
            lengths = [self.length(example) for example in examples]
            order = window_order(lengths, batch_size, f"{self.seed}/window/{number}")
            while len(self._kept) > 1:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = [examples[index] for index in order]
        return self._kept[key]


def end_of_window(position: int, size: int) -> int:
    """The first position of the next window, or this one where a window begins."""
    return -(-position // size) * size
