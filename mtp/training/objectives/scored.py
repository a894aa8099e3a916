"""Input of all streams: the scored rows of a batch under the model being trained.

Each stream computes its own quantity from hidden rows and output layers: log-probability and
entropy of given tokens, or a divergence from other rows. Results are cached, so that two streams
that need the same numbers share one computation.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mtp_kernels import LinearLoss, linear_kl, linear_logprob, linear_loss
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from ...modeling.output_layer import OutputLayer
from ...modeling.sampler import Sampler
from ..batch import TextBatch

PLAIN = Sampler()
OVERLAP_LOGITS = 1 << 24
"""Number of logits of each emitter that `OutputRows.overlap` holds at once."""


class RowStats(NamedTuple):
    """Statistics per row, float32."""

    logprob: Tensor
    """[R] log-probability of the target."""
    entropy: Tensor
    """[R] entropy in nats, without gradient."""


@dataclass
class OutputRows:
    """Hidden rows of one emitter; their logits, `output.logits(hidden)`, are not computed."""

    hidden: Tensor
    """[R, E] hidden rows."""
    output: OutputLayer
    """The emitter's output layer."""
    targets: Tensor
    """[R] int64 token ids."""
    impl: str = "auto"
    """Implementation of `mtp_kernels` ops."""

    def __post_init__(self) -> None:
        self._stats: dict[str, RowStats] = {}

    def stats(self, sampler: Sampler = PLAIN) -> RowStats:
        """Statistics under a sampler's distribution."""
        key = repr(sampler)
        if key not in self._stats:
            if sampler.truncates:
                self._stats[key] = self._truncated_stats(sampler)
            else:
                out = linear_logprob(
                    self.output.rows(self.hidden),
                    self.output.weight,
                    self.output.rows_of(self.targets),
                    **self.output.options,
                    temperature=sampler.temperature or 1.0,
                    impl=self.impl,
                )
                logprob = out.logprob
                if self.output.tokens is not None:
                    known = self.output.has_row(self.targets)
                    logprob = logprob.masked_fill(~known, -torch.inf)
                self._stats[key] = RowStats(logprob, out.entropy.detach())
        return self._stats[key]

    def has_stats(self, sampler: Sampler) -> bool:
        """True if these statistics have been computed."""
        return repr(sampler) in self._stats

    def stats_are(self, sampler: Sampler, stats: RowStats) -> None:
        """Store statistics that were computed elsewhere, for the next call of `stats`."""
        self._stats[repr(sampler)] = stats

    def _truncated_stats(self, sampler: Sampler) -> RowStats:
        """Statistics from all logits of a row, on which top-k and top-p depend."""
        log_probs = sampler.log_probs(self.output.logits(self.hidden))
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1)
        return RowStats(log_probs.gather(-1, self.targets[:, None])[:, 0], entropy)

    def cross_entropy(self, row_weight: Tensor | None = None) -> LinearLoss:
        """Sum over the rows of -log-probability of the target, weighted by `row_weight` [R].

        Its gradient is computed in the forward, so that logits are computed once. Every target must
        have a row in the output layer: the loss of another is infinite.
        """
        if row_weight is None:
            row_weight = torch.ones_like(self.targets, dtype=torch.float32)
        if self.output.tokens is not None:
            torch._assert_async(
                self.output.has_row(self.targets).all(),
                "a target is not in the draft vocabulary: `within_draft_vocabulary` leaves it out",
            )
        out = linear_loss(
            self.output.rows(self.hidden),
            self.output.weight,
            self.output.rows_of(self.targets),
            **self.output.options,
            row_weight=row_weight,
            impl=self.impl,
        )
        return out._replace(argmax=self.output.ids_of(out.argmax))

    def kl(self, hidden: Tensor, output: OutputLayer, rows: Tensor, *, reverse: bool) -> Tensor:
        """[R] nats: KL(other || this) of each row, or KL(this || other) if `reverse`.

        Row i is compared with row `rows[i]` of `hidden` [., D] under the layer `output`. If this
        emitter has a draft vocabulary, the other distribution is conditioned on it: one of the two
        divergences would be infinite otherwise.
        """
        output = output.given(self.output.tokens)
        if self.output.softcap != output.softcap:
            # The op has one softcap for both distributions.
            mine = PLAIN.log_probs(self.output.row_logits(self.hidden))
            other = PLAIN.log_probs(output.row_logits(hidden[rows]))
            p, q = (mine, other) if reverse else (other, mine)
            return kl_div(q, p, log_target=True, reduction="none").sum(-1)
        direction = "reverse" if reverse else "forward"
        return linear_kl(
            self.output.rows(self.hidden),
            self.output.weight,
            output.rows(hidden),
            output.weight,
            **self.output.options,
            teacher_bias=output.bias,
            index=rows,
            direction=direction,
            impl=self.impl,
        ).kl

    def overlap(
        self, hidden: Tensor, output: OutputLayer, rows: Tensor, sampler: Sampler
    ) -> Tensor:
        """[R] sum over the vocabulary of min(other, this): the probability that a draft from this
        distribution is accepted by the other, both as the sampler makes them.

        Row i is compared with row `rows[i]` of `hidden` [., D] under the layer `output`. Logits
        are computed for some rows at a time, and again in the backward.
        """

        def part(mine: Tensor, other: Tensor) -> Tensor:
            q = sampler.log_probs(self.output.logits(mine)).exp()
            p = sampler.log_probs(output.logits(other)).exp()
            return torch.minimum(p, q).sum(-1)

        size = max(1, OVERLAP_LOGITS // output.weight.shape[0])
        pairs = zip(self.hidden.split(size), hidden[rows].split(size), strict=True)
        return torch.cat([checkpoint(part, *pair, use_reentrant=False) for pair in pairs])


@dataclass
class Scored:
    """A batch after one parallel forward."""

    main: OutputRows
    """Main's tokens."""
    head: OutputRows
    """The head's tokens; empty if no stream scores the head."""
    flat_hidden: Tensor
    """[B * T, D] every row of main, for streams that compare the head with it."""

    def stats(self, sampler: Sampler = PLAIN) -> dict[str, RowStats]:
        """Statistics of `main` and of `head`, as `OutputRows.stats` returns them.

        If both use one output layer, one op serves both: otherwise each would compute, cast and add
        up a gradient of the whole matrix.
        """
        main, head = self.main, self.head
        shared = head.output is main.output and len(head.targets) and not sampler.truncates
        if shared and not main.has_stats(sampler):
            both = OutputRows(
                torch.cat([main.hidden, head.hidden]),
                main.output,
                torch.cat([main.targets, head.targets]),
                main.impl,
            ).stats(sampler)
            sizes = [len(main.targets), len(head.targets)]
            parts = zip(*(values.split(sizes) for values in both), strict=True)
            main.stats_are(sampler, RowStats(*next(parts)))
            head.stats_are(sampler, RowStats(*next(parts)))
        return {"main": main.stats(sampler), "head": head.stats(sampler)}


def replay_batch(
    model: Any,
    batch: TextBatch,
    *,
    channel_gradient: float,
    use_head: bool,
    logits_detach: bool = False,
    impl: str = "auto",
) -> Scored:
    """One forward of main over the batch's text and of the head at its anchors.

    Args:
        model: runs the forward (wrapped by Fabric, or the bare model).
        batch: text and rows.
        channel_gradient: scale of the head's gradient on main's parameters.
        use_head: False skips the head and its rows.
        logits_detach: detach the head's gradient from an output layer shared with main.
        impl: implementation of `mtp_kernels` ops.
    """
    if use_head:
        anchors, slot_inputs = batch.anchors, batch.slot_inputs
        if not len(anchors):
            # No example has text for the head. It runs at one anchor without scored slots, so that
            # its gradient is zero and not missing.
            anchors = anchors.new_zeros(1)
            slot_inputs = batch.tokens[:1, :1].expand(1, slot_inputs.shape[1])
        rows = model.replay(
            batch.tokens, anchors, slot_inputs, channel_gradient, logits_detach=logits_detach
        )
        head_hidden = rows.head_hidden.flatten(0, 1)[batch.head.outputs]
        head_targets = batch.head.targets
    else:
        rows = model.replay(batch.tokens)
        head_hidden = rows.main_hidden.new_zeros(0, rows.head_output.weight.shape[1])
        head_targets = batch.head.targets[:0]
    flat = rows.main_hidden.flatten(0, 1)
    main = OutputRows(flat[batch.main.outputs], rows.main_output, batch.main.targets, impl)
    head = OutputRows(head_hidden, rows.head_output, head_targets, impl)
    return Scored(main, head, flat)
