"""What every stream reads: the scored rows of a batch under the model being trained.

Hidden rows and output matrices, from which each stream takes what it needs: log-probability and
entropy of given tokens, or a divergence from other rows. Results are cached, so that two streams
that need the same numbers share one computation.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import TextBatch
from ..generation_mtp import Sampler

PLAIN = Sampler()


class RowStats(NamedTuple):
    """Per row, float32."""

    logprob: Tensor
    """[R] log-probability of the target."""
    entropy: Tensor
    """[R] nats; without gradient."""
    correct: Tensor
    """[R] bool: the likeliest token is the target."""


@dataclass
class Emitter:
    """Rows of one emitter: logits are `hidden @ weight.T`."""

    hidden: Tensor
    """[R, E]"""
    weight: Tensor
    """[V, E]"""
    targets: Tensor
    """[R]"""

    def __post_init__(self) -> None:
        self._stats: dict[str, RowStats] = {}

    def logits(self) -> Tensor:
        """[R, V] float32."""
        return (self.hidden @ self.weight.T).float()

    def stats(self, sampler: Sampler = PLAIN) -> RowStats:
        """Statistics under a sampler's distribution."""
        key = repr(sampler)
        if key not in self._stats:
            log_probs = sampler.log_probs(self.logits())
            with torch.no_grad():
                p = log_probs.exp()
                entropy = -(p * log_probs.clamp(min=-1e4)).sum(-1)
                correct = log_probs.argmax(-1) == self.targets
            logprob = log_probs.gather(-1, self.targets[:, None])[:, 0]
            self._stats[key] = RowStats(logprob, entropy, correct)
        return self._stats[key]


@dataclass
class Scored:
    """A batch after one parallel forward."""

    main: Emitter
    head: Emitter
    """Zero rows where the stage has no head."""
    flat_hidden: Tensor
    """[B * T, D] every row of main, for streams that compare the head with it."""


def score_batch(
    model: Any, parts: Any, batch: TextBatch, *, channel_gradient: float, use_head: bool
) -> Scored:
    """One forward of main over the batch's text and of the head at its anchors.

    Args:
        model: what runs the forward (wrapped by Fabric, or the bare model).
        parts: the bare model, whose matrices are read.
        batch: text and rows.
        channel_gradient: scale of the head's gradient on main's parameters.
        use_head: False skips the head and its rows.
    """
    if use_head and len(batch.anchors):
        rows = model.score(batch.tokens, batch.anchors, batch.slot_inputs, channel_gradient)
        head_hidden = rows.head_hidden.flatten(0, 1)[batch.head_rows]
        head_targets = batch.head_targets
    else:
        rows = model.score(batch.tokens)
        head_hidden = rows.main_hidden.new_zeros(0, parts.head_output_weight().shape[1])
        head_targets = batch.head_targets[:0]
    flat = rows.main_hidden.flatten(0, 1)
    main = Emitter(flat[batch.main_rows], parts.get_output_embeddings().weight, batch.main_targets)
    head = Emitter(head_hidden, parts.head_output_weight(channel_gradient), head_targets)
    return Scored(main, head, flat)


def row_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row: two [R, V] log-probabilities -> [R] nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
