"""What a stream of the objective gives."""

from typing import NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """One stream over one micro-batch."""

    total: Tensor
    """Sum over the stream's tokens, with gradient; divided by the stream's global count later."""
    weight: float
    metrics: dict[str, tuple[Tensor, int]]
    """Name -> (sum, count), to be added over micro-batches and processes before dividing."""


def mean_of(values: Tensor) -> tuple[Tensor, int]:
    """A metric that is the mean of some values over all micro-batches."""
    with torch.no_grad():
        return values.float().sum(), values.numel()
