"""A stream of the objective: its inputs, its terms and its properties.

A new stream is one file: a dataclass that derives from `Stream`, and a line that names it,
`STREAMS.add("my_stream", MyStream)`. A run adds it by
`+stages.NAME.objective.extra.my_stream.weight=1`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...common.bounds import bounded
from ...modeling.output_layer import OutputLayer
from ...modeling.sampler import Sampler
from ..batch import RolloutBatch, TextBatch
from .scored import Scored

Reads = Literal["text", "solved", "rollouts"]
"""Batches that a stream reads. `text`: those that its stage trains on, rollouts in an RL step.
`solved`: solved examples, also where they are mixed into an RL step. `rollouts`: rollouts only."""


@dataclass
class ReferenceRows:
    """The frozen reference over the same text, without gradient."""

    hidden: Tensor
    """[B * T, D] hidden rows of its main."""
    output: OutputLayer
    """Its output layer."""


@dataclass
class StreamInputs:
    """Inputs of a stream: one micro-batch after its forward."""

    scored: Scored
    """Rows of the batch under the model being trained."""
    batch: TextBatch
    """Text and rows."""
    sampler: Sampler = field(default_factory=Sampler)
    """The distribution that rollouts were sampled from."""
    reference: ReferenceRows | None = None
    """Rows of the frozen reference; set if the stream `needs_reference`."""

    def reference_rows(self) -> ReferenceRows:
        """The reference's rows. Raises ValueError if there are none."""
        if self.reference is None:
            raise ValueError("the objective needs a reference model, got none")
        return self.reference


@dataclass
class Term:
    """One stream over one micro-batch."""

    total: Tensor
    """Sum over the stream's tokens, with gradient; divided later by the stream's global count."""
    weight: float
    """Weight of the term in the loss."""
    metrics: Mapping[str, tuple[Tensor, int | Tensor]]
    """Name -> (sum, count), added over micro-batches and processes before dividing. Nothing reads a
    tensor before the end of the step, so that the host does not wait for a GPU."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Name -> maximum, taken over micro-batches and processes."""


@dataclass(kw_only=True)
class Stream:
    """A weighted sum of per-token losses."""

    scores_head: ClassVar[bool] = True
    """True if the stream scores the head's tokens."""
    needs_reference: ClassVar[bool] = False
    """True if the stream compares with a frozen reference."""
    metrics_prefix: ClassVar[str] = ""
    """Prefix of its metrics' names in an RL step."""

    weight: float = bounded(0.0, at_least=0)
    """Weight of the stream in the loss; 0: the stream is not computed."""

    @property
    def reads(self) -> Reads:
        """Batches that the stream reads."""
        return "text"

    @property
    def trains_head(self) -> bool:
        """True if the stream has a gradient for the head."""
        return self.scores_head

    def validate(self, key: str) -> None:
        """Raises ValueError naming the key of an impossible value."""

    def counts(self, batch: TextBatch) -> Mapping[str, float | Tensor]:
        """Tokens of each of its terms in one micro-batch, by the names of `terms`."""
        raise NotImplementedError

    def terms(self, inputs: StreamInputs) -> dict[str, Term]:
        """The terms of one micro-batch, by names that no other stream uses."""
        raise NotImplementedError


@dataclass(kw_only=True)
class SupervisedStream(Stream):
    """A stream that reads solved examples, or rollouts in their place."""

    metrics_prefix: ClassVar[str] = "supervised/"

    on_rollouts: bool = False
    """In an RL stage: score the policy's own rollouts. False: score the solved examples that are
    mixed into the step, `num_solved` of them."""

    @property
    def reads(self) -> Reads:
        return "rollouts" if self.on_rollouts else "solved"


@dataclass(kw_only=True)
class SlotWeights:
    """Settings of a stream over the head's tokens whose slots may differ in weight."""

    slot_weights: list[float] = bounded([], at_least=0)
    """Weights of slots 1..K; empty: equal weights. The sum is divided by the weights' sum."""

    def row_weights(self, batch: TextBatch, stream: str) -> Tensor:
        """[R] float32 weight of each of the head's rows; `stream` is named in the ValueError for a
        wrong number of weights.
        """
        slots = batch.head.slots
        if not self.slot_weights:
            return torch.ones_like(slots, dtype=torch.float32)
        num_head_slots = batch.slot_inputs.shape[1]
        if len(self.slot_weights) != num_head_slots:
            raise ValueError(
                f"{stream}.slot_weights must have {num_head_slots} entries, one per head slot, got "
                f"{len(self.slot_weights)}; leave it empty for equal weights"
            )
        weights = torch.tensor(self.slot_weights, dtype=torch.float32, device=slots.device)
        return weights[slots - 1]

    def weight_sum(self, batch: TextBatch, stream: str) -> float | Tensor:
        """Sum of the weights of the head's rows."""
        return self.row_weights(batch, stream).sum() if self.slot_weights else len(batch.head)


def rollouts_of(batch: TextBatch) -> RolloutBatch:
    """The batch, which must be one of rollouts."""
    if not isinstance(batch, RolloutBatch):
        raise ValueError("objective.policy reads rollouts, got a batch of solved examples")
    return batch


def mean_of(values: Tensor) -> tuple[Tensor, int]:
    """A metric that is the mean of some values over all micro-batches."""
    with torch.no_grad():
        return values.float().sum(), values.numel()


def mean_where(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """A metric that is the mean of the chosen values [R], chosen [R] bool."""
    with torch.no_grad():
        return torch.where(chosen, values.float(), 0.0).sum(), chosen.sum()


def mean_by_slot(name: str, values: Tensor, batch: TextBatch) -> dict[str, tuple[Tensor, Any]]:
    """Metrics of the head's rows [R]: the mean as `name`, and that of slot J as `name`_J."""
    slots, number = batch.head.slots, batch.slot_inputs.shape[1]
    by_slot = {f"{name}_{j}": mean_where(values, slots == j) for j in range(1, number + 1)}
    return {name: mean_of(values), **by_slot}


def max_of(values: Tensor) -> Tensor:
    """Maximum of some values that are 0 or above; 0 if there are none."""
    with torch.no_grad():
        return values.float().max() if len(values) else values.new_zeros((), dtype=torch.float32)
