"""What a stream of the objective gives."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Term:
    """One stream over one micro-batch."""

    total: Tensor
    """Sum over the stream's tokens, with gradient; divided by the stream's global count later."""
    weight: float
    metrics: dict[str, tuple[Tensor, int]]
    """Name -> (sum, count), to be added over micro-batches and processes before dividing."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Name -> largest value, of which the largest over micro-batches and processes is taken."""


def mean_of(values: Tensor) -> tuple[Tensor, int]:
    """A metric that is the mean of some values over all micro-batches."""
    with torch.no_grad():
        return values.float().sum(), values.numel()


def max_of(values: Tensor) -> Tensor:
    """A metric that is the largest of some values that are 0 or above; 0 if there are none."""
    with torch.no_grad():
        return values.float().max() if len(values) else values.new_zeros((), dtype=torch.float32)
