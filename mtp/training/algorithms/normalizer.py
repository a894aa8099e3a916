"""Normalisers: what the sum over an emitter's tokens is divided by.

Example, two rollouts of which the first has three tokens of the emitter and the second one:

    per_token      (a + b + c + d) / 4
    per_sequence   ((a + b + c) / 3 + d) / 2
    per_rollout    (a + b + c + d) / 2
    per_length     (a + b + c + d) / (2 * length)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.registry import Registry
from ..batch import PolicyRows, RolloutBatch, num_distinct
from .ratio import group_sum


@dataclass(frozen=True)
class Division:
    """Division of the sum of one emitter's tokens in one micro-batch."""

    divisors: Tensor
    """[R] float32 divisor of each token before the sum."""
    count: float | Tensor
    """This micro-batch's part of the sum's divisor: counts are added over all micro-batches and
    processes."""


@dataclass(frozen=True)
class Normalizer:
    """A rule of division."""

    divide: Callable[[PolicyRows, RolloutBatch, int], Division]
    """(tokens of one emitter, the micro-batch, `policy.length`)."""
    needs_length: bool = False
    """True if `policy.length` must be set."""


def _ones(rows: PolicyRows) -> Tensor:
    return torch.ones_like(rows.old)


def _sequence(rows: PolicyRows, batch: RolloutBatch, length: int) -> Division:
    return Division(group_sum(_ones(rows), rows.rollouts), num_distinct(rows.rollouts))


per_token = Normalizer(lambda rows, batch, length: Division(_ones(rows), len(rows)))
"""Divides by the number of the emitter's tokens."""
per_sequence = Normalizer(_sequence)
"""Divides each rollout's tokens by their number, then by the number of rollouts that have such
tokens."""
per_rollout = Normalizer(lambda rows, batch, length: Division(_ones(rows), batch.num_rollouts))
"""Divides by the number of rollouts."""
per_length = Normalizer(
    lambda rows, batch, length: Division(_ones(rows), batch.num_rollouts * length),
    needs_length=True,
)
"""Divides by the number of rollouts times a fixed length."""

NORMALIZERS: Registry[Normalizer] = Registry(
    tokens=per_token, sequences=per_sequence, rollouts=per_rollout, length=per_length
)
