"""Dense tensors that an update reads: which row predicts which token, and who sampled it.

A batch is flat text plus two lists of rows: `main`, the tokens that main sampled, and `head`, those
that the head sampled. Both are `Rows`. Everything is packed: each row is scored, so that a stream's
count is the length of its list.

Rollouts with the same tokens in the same blocks share one text, which goes through the models once;
each rollout has rows of its own. Small policies repeat themselves a lot within a group. A rollout
of several segments has a text for each, and one advantage for all of them.

Example, K = 2: one text of prompt `p` and completion `a b c d`, in the blocks `a b c` and `d`.

    position      0  1  2  3  4
    tokens        p  a  b  c  d        [B = 1, T = 5]
    slot          .  0  1  2  0        who sampled it: 0 is main, 1..K the head
    anchors      [0]                   the head runs where the first block begins
    slot_inputs  [[a, b]]              what its two slots read
    main         positions [0, 3]  slots [0, 0]  targets [a, d]  outputs [0, 3]
    head         positions [1, 2]  slots [1, 2]  targets [b, c]  outputs [0, 1]

The second block keeps no token of the head, so position 3 is no anchor of the batch. Row 0 of the
head is slot 1 of anchor 0: its token b follows position 1, where main predicts the same token.

Shapes: B texts, T time, N anchors, K head slots, R rows of an emitter, G rollouts. Indices and
token ids are int64, log-probabilities float32 in nats.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from ..modeling.output_layer import has_row

AnyRows = TypeVar("AnyRows", bound="Rows")
AnyBatch = TypeVar("AnyBatch", bound="TextBatch")


@dataclass
class Rows:
    """Tokens of one emitter that are scored, one row each."""

    positions: Tensor
    """[R] int64 index into B * T of main's row that predicts the token: the token follows it."""
    slots: Tensor
    """[R] int64 slot of the token in its block: 0 for main, 1..K for the head."""
    targets: Tensor
    """[R] int64 id of the token."""
    outputs: Tensor
    """[R] int64 row of the emitter's hidden states that predicts the token: index into B * T for
    main, where it equals `positions`, and into N * K for the head."""

    def __len__(self) -> int:
        """Number of rows, R."""
        return len(self.targets)

    @property
    def anchors(self) -> Tensor:
        """[R] int64 index into B * T of the anchor of the pass that sampled the token."""
        return self.positions - self.slots

    def take(self: AnyRows, chosen: Tensor | slice) -> AnyRows:
        """The rows of an index [.], a mask [R] or a slice."""
        return type(self)(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})

    def to(self: AnyRows, device: torch.device) -> AnyRows:
        """The same rows on a device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass
class PolicyRows(Rows):
    """Rows of rollouts, with what the policy objective needs."""

    rollouts: Tensor
    """[R] int64 number of the row's rollout in the batch, 0..G-1."""
    advantages: Tensor
    """[R] float32 advantage of that rollout."""
    sampled: Tensor
    """[R] float32 log-probability under which the token was sampled, in nats."""
    old: Tensor
    """[R] float32 old log-probability of the ratio, in nats: the sampler's, or that of a replay
    before the update."""


@dataclass
class TextBatch:
    """Text and the rows of it that are scored."""

    tokens: Tensor
    """[B, T] int64 ids, padded on the right."""
    anchors: Tensor
    """[N] int64 index into B * T of each anchor at which the head runs."""
    slot_inputs: Tensor
    """[N, K] int64 ids t_0..t_{K-1} that the slots 1..K read."""
    main: Rows
    """Tokens of main."""
    head: Rows
    """Tokens of the head."""

    def to(self: AnyBatch, device: torch.device) -> AnyBatch:
        """The same batch on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: v.to(device) for name, v in values.items() if not isinstance(v, bool)}
        return replace(self, **moved)


def without_rows(batch: AnyBatch) -> AnyBatch:
    """The first text of a batch with no row that is scored: its losses and gradients are zero.

    For a process that has nothing left to train on while others have.
    """
    return replace(
        batch,
        tokens=batch.tokens[:1],
        anchors=batch.anchors[:0],
        slot_inputs=batch.slot_inputs[:0],
        main=batch.main.take(slice(0)),
        head=batch.head.take(slice(0)),
    )


def within_draft_vocabulary(batch: AnyBatch, tokens: Tensor | None) -> AnyBatch:
    """The batch without rows of the head whose target it cannot write.

    Their log-probability is -inf whatever the weights are, so they teach nothing. They count in no
    divisor.

    tokens: [W] ids of the draft vocabulary, `Head.draft_tokens`; None: all are in it.
    """
    if tokens is None:
        return batch
    return replace(batch, head=batch.head.take(has_row(tokens, batch.head.targets)))


def num_distinct(numbers: Tensor) -> Tensor:
    """[] int64 number of different values in [R], without a wait for the device."""
    ordered = numbers.sort().values
    return (ordered[1:] != ordered[:-1]).sum() + min(len(ordered), 1)


@dataclass
class RolloutBatch(TextBatch):
    """Text that the policy sampled. The rows of a rollout of several segments are in several texts.

    Example, two rollouts with the text above, of advantages 1 and -1: one text, each row twice.

        main         targets [a, a, d, d]  rollouts [0, 1, 0, 1]  advantages [1, -1, 1, -1]
    """

    main: PolicyRows
    """Tokens of main."""
    head: PolicyRows
    """Tokens of the head."""
    head_samples: bool = True
    """True if the head sampled its tokens. False: they are main's, which the head's rows score, one
    of them perhaps in several rows."""

    @cached_property
    def num_rollouts(self) -> Tensor:
        """[] int64 number of rollouts, G. Main samples tokens in every rollout."""
        return num_distinct(self.main.rollouts)

    def blocks(self, rows: PolicyRows) -> Tensor:
        """[R] int64 number of each token's block, the same for the rows of main and of the head."""
        return rows.rollouts * self.tokens.numel() + rows.anchors
