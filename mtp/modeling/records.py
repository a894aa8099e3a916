"""Records that the pass loop writes: of a whole batch, of one pass, of the head's slots in one
pass.

Ships with checkpoints: imports torch only.

Shapes: B rows of the batch, L their tokens, R rows still running, W tokens of a pass, F rows that
use the head, J of its slots, V vocabulary, H width of the rows that its output matrix reads.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FORCED = -2
"""Slot of a token that was not sampled but written to close a phase."""


@dataclass
class Decoded:
    """Output of the pass loop, per row of the batch: B rows, at most L tokens."""

    tokens: Tensor
    """[B, L] int64, padded on the right with the pad id."""
    slots: Tensor
    """[B, L] int64: the slot whose distribution each token follows. 0: main's; 1..K: the head's
    slot; -1: padding; -2 (`FORCED`): none. All tokens of a verified phase follow main's."""
    logprobs: Tensor
    """[B, L] float32 under that distribution, as the sampler makes it; 0 on padding and forced."""
    lengths: Tensor
    """[B] int64 tokens."""
    passes: Tensor
    """[B] int64 forward passes of main."""
    finished: Tensor
    """[B] bool: True if an end-of-sequence token or a stopping criterion ended the row, not the
    limit."""
    accepted: Tensor = field(default_factory=lambda: torch.empty(0))
    """[B, L] int64: the slot of the head that proposed the token, if main accepted it; 0 for all
    others. If empty: 0 everywhere."""
    closed: Tensor = field(default_factory=lambda: torch.empty(0))
    """[B] bool: True if a token that closes a segment (`Phase.closed_by`) ended the row, which is
    then not `finished`. If empty: False everywhere."""

    def __post_init__(self) -> None:
        if self.accepted.shape != self.tokens.shape:
            self.accepted = torch.zeros_like(self.tokens)
        if self.closed.shape != self.finished.shape:
            self.closed = torch.zeros_like(self.finished)

    def to(self, device: torch.device | str) -> "Decoded":
        """The same record on a device."""
        return Decoded(**{name: value.to(device) for name, value in vars(self).items()})

    def select(self, rows: list[int] | Tensor) -> "Decoded":
        """The record of the given rows, in their order."""
        return Decoded(**{name: value[rows] for name, value in vars(self).items()})

    @classmethod
    def join(cls, parts: list["Decoded"], pad_id: int) -> "Decoded":
        """Records concatenated along rows, each padded to the longest."""
        longest = max(part.tokens.shape[1] for part in parts)
        fills = {"tokens": pad_id, "slots": -1}

        def joined(name: str) -> Tensor:
            values = [getattr(part, name) for part in parts]
            if values[0].ndim == 1:
                return torch.cat(values)
            fill = fills.get(name, 0)
            return torch.cat([F.pad(v, (0, longest - v.shape[1]), value=fill) for v in values])

        return cls(**{name: joined(name) for name in vars(parts[0])})

    def completion(self, row: int) -> list[int]:
        """Token ids of a row's output."""
        return self.tokens[row, : int(self.lengths[row])].tolist()

    def ended_by(self, row: int) -> str:
        """Reason why a row ended.

        `end`: an end token or a stopping criterion; `limit`: `max_new_tokens`; `delimiter` and
        `budget`: a token that closes a segment, written by the model or by force.
        """
        if not self.closed[row]:
            return "end" if self.finished[row] else "limit"
        is_forced = int(self.slots[row, int(self.lengths[row]) - 1]) == FORCED
        return "budget" if is_forced else "delimiter"


def pad(sequences: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ragged ids -> [B, T] int64 padded on the right, and lengths [B] int64."""
    lengths = torch.tensor([len(s) for s in sequences])
    tokens = torch.full((len(sequences), int(lengths.max())), pad_id)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return tokens, lengths


@dataclass
class Block:
    """The tokens that a pass added to each running row: R rows, at most W tokens."""

    rows: Tensor
    """[R] int64 indices of the rows in the batch."""
    tokens: Tensor
    """[R, W] int64."""
    slots: Tensor
    """[R, W] int64, see `Decoded`."""
    accepted: Tensor
    """[R, W] int64, see `Decoded`."""
    logprobs: Tensor
    """[R, W] float32, see `Decoded`."""
    lengths: Tensor
    """[R] int64 valid tokens; 0 for a row that has ended."""


class Slots(NamedTuple):
    """Output of the head in J slots of F rows."""

    tokens: Tensor
    """[F, J] int64."""
    logprobs: Tensor
    """[F, J] float32 of the tokens."""
    likeliest: Tensor
    """[F, J] float32: log-probability of the likeliest token, which is compared with a
    threshold."""
    source: Tensor
    """The distributions that the tokens were sampled from: [F, J, V] float32 log-probabilities or,
    if a kernel sampled them, [F, J, H] hidden rows; [F, J, 0] if they are not needed."""

    @classmethod
    def join(cls, parts: list["Slots"]) -> "Slots":
        """Consecutive slots of the same rows."""
        return cls(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))
