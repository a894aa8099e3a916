"""The state of a batch's rows between two passes: the output so far, and the input of the next
pass.

Ships with checkpoints: imports torch and siblings only.

Shapes: B rows of the batch, R rows still running, W tokens that a pass adds, L tokens fed to a
pass, J drafts, K head slots, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .phases import PhasePlan, PlanTables
from .records import FORCED, Block, Decoded

Stop = Callable[[Tensor, Any], Tensor]
"""Signature of a `StoppingCriteria`: token ids [B, T] and None -> [B] bool."""


class Stops(NamedTuple):
    """Stopping criteria of two kinds."""

    each: Stop | None
    """Called after every token, with the rows that have just written it."""
    in_step: Stop | None
    """Called with all rows at once, all of one number of new tokens, as in transformers'
    `generate`: when the slowest row has that many. It may identify rows by their index, keep state
    from token to token, and return one bool for all. A row that is ahead is cut back to the token
    at which it returned True."""


Texts = Iterator[tuple[Tensor, Tensor, Tensor]]
"""Groups of F rows by length: the indices of a group's rows [G], their texts [G, W], and the number
of each text's first columns that are padding [G]."""


def splice(count: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Concatenate row-wise: the first `count` [R] columns of `first` [R, J], then `second` [R, W].

    Returns [R, J + W]; the rest of each row is padding with undefined values.
    """
    width = first.shape[1]
    if not width:
        return second
    both = torch.cat([first, second], 1)
    column = torch.arange(both.shape[1], device=both.device)
    source = torch.where(column < count[:, None], column, column + width - count[:, None])
    return both.gather(1, source.clamp(max=both.shape[1] - 1))


class RunningRows:
    """A batch of which some rows are still running."""

    def __init__(
        self,
        prompts: Tensor,
        prompt_lengths: Tensor,
        plans: list[PhasePlan],
        max_new_tokens: int,
        limits: Tensor | None,
        pad_id: int,
        stop: Stop | Stops | None,
    ):
        """State before the first pass of prompts [B, T] with lengths [B].

        limits: [B] int64 maximum of each row, at most `max_new_tokens`; None: that.
        """
        device, num_rows = prompts.device, len(prompts)
        self.plan, self.tables = plans[0], PlanTables(plans, max_new_tokens + 1, device)
        self.prompts, self.prompt_lengths = prompts, prompt_lengths
        self.limits = torch.full((num_rows,), max_new_tokens, device=device)
        if limits is not None:
            if limits.shape != self.limits.shape:
                raise ValueError(
                    f"limits must be one for each of {num_rows} rows, got {list(limits.shape)}"
                )
            self.limits = torch.minimum(self.limits, limits.to(device))
        self.pad_id = pad_id
        self.stop = Stops(stop, None) if callable(stop) else stop
        self.num_in_step = 0  # new tokens that `Stops.in_step` was called with
        # Room beyond the limit for the tokens that a cut drops.
        self.room = max_new_tokens + 2 * (self.tables.num_head_slots + 1)

        # Output, for all rows of the batch.
        self.out = Decoded(
            tokens=torch.full((num_rows, self.room), pad_id, device=device),
            slots=torch.full((num_rows, self.room), -1, device=device),
            logprobs=torch.zeros(num_rows, self.room, device=device),
            lengths=torch.zeros(num_rows, dtype=torch.long, device=device),
            passes=torch.zeros(num_rows, dtype=torch.long, device=device),
            finished=torch.zeros(num_rows, dtype=torch.bool, device=device),
            accepted=torch.zeros(num_rows, self.room, dtype=torch.long, device=device),
            closed=torch.zeros(num_rows, dtype=torch.bool, device=device),
        )

        # Rows still running; `rows` gives their indices in the batch.
        self.rows = torch.arange(num_rows, device=device)
        self.active = self.limits > 0
        self.phase = self.plan.phase_after(prompts).gather(1, prompt_lengths[:, None] - 1)[:, 0]
        self.in_phase = torch.zeros_like(prompt_lengths)  # output tokens of the current phase
        self.closed = torch.zeros_like(self.active)  # the segment was closed (`Phase.closed_by`)
        # A pass is fed `num_fresh` tokens that are kept, then `num_drafts` that are to be verified.
        self.fed, self.num_fresh = prompts, prompt_lengths
        self.drafts, self.num_drafts = prompts[:, :0], torch.zeros_like(prompt_lengths)
        self.draft_source: Tensor | None = None  # of sampled drafts, see `Slots`
        self.start = torch.zeros_like(prompt_lengths)  # position of the first fed token
        self.length = prompts.shape[1]  # positions of the longest row, with the fed tokens
        self.is_even = bool((prompt_lengths == self.length).all())  # running rows end at `length`
        self.num_active = num_rows
        self.all_use_head = bool((self.kept_of_block() > 1).all())
        self.any_uses_head = True

    def resume(self, written: Decoded, phase: Tensor, in_phase: Tensor, start: Tensor) -> None:
        """Begin at partly `written` texts instead of the prompts, one per row.

        Args:
            written: the rows' output so far.
            phase: [R] index of the phase that the next pass begins in.
            in_phase: [R] output tokens of that phase so far.
            start: [R] position of the first token that main has not read.
        """
        for name, values in vars(written).items():
            getattr(self.out, name)[..., : values.shape[-1]] = values
        self.phase, self.in_phase, self.start = phase, in_phase, start
        self.num_fresh = self.known() - start
        numbers = self.num_fresh.max(), start.max(), self.kept_of_block().min()
        widest, farthest, fewest = torch.stack(numbers).tolist()
        text = splice(self.prompt_lengths, self.prompts, self.out.tokens)
        columns = torch.arange(widest, device=text.device)
        fed = text.gather(1, (start[:, None] + columns).clamp(max=text.shape[1] - 1))
        self.fed = torch.where(columns < self.num_fresh[:, None], fed, self.pad_id)
        self.length, self.drafts = farthest + widest, fed[:, :0]
        self.all_use_head, self.any_uses_head, self.is_even = fewest > 1, True, False

    def kept_of_block(self) -> Tensor:
        """[R] maximum number of tokens per block that the phase of each running row keeps."""
        return self.tables.keep.gather(1, self.phase[:, None])[:, 0]

    def known(self) -> Tensor:
        """[R] tokens of each running row's text, its prompt included."""
        return self.prompt_lengths[self.rows] + self.out.lengths[self.rows]

    def texts(self, asked: Tensor, index: Tensor, extra: Tensor, num_extra: Tensor) -> Texts:
        """Texts of running rows, `index` [F], followed by `num_extra` [F] tokens of `extra` [F, E].

        Yields those that are True in `asked` [F], rows with the same number of new tokens together:
        their indices among the F [G], their texts [G, T + new], with the prompts' own padding on
        the left, and the rest of `Texts`. Hence a text has the same width as in transformers'
        `generate`, however long the other rows of the batch are.
        """
        rows = self.rows[index]
        new = self.out.lengths[rows] + num_extra
        text = splice(self.prompt_lengths[rows], self.prompts[rows], self.out.tokens[rows])
        text = splice(self.known()[index], text, extra)
        for number in new[asked].unique().tolist():
            where = (asked & (new == number)).nonzero()[:, 0]
            width = self.prompts.shape[1]
            padding = width - self.prompt_lengths[rows[where]]
            source = torch.arange(width + number, device=text.device) - padding[:, None]
            known = text[where].gather(1, source.clamp(min=0))
            given = self.prompts[rows[where]].gather(1, source.remainder(width))
            yield where, torch.where(source < 0, given, known), padding

    def enter_phases(self, tokens: Tensor, count: Tensor) -> Tensor:
        """Update the phases for `count` [R] more tokens of `tokens` [R, J], of which only the last
        may be a delimiter or an end token.

        Returns [R] bool, True where this token ends the row's text.
        """
        if not tokens.shape[1]:
            return torch.zeros_like(self.active)
        last = tokens.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
        begun = self.plan.opened(last)
        enters = (count > 0) & (begun >= 0)
        self.closed = self.closed | ((count > 0) & self.plan.closes(last, self.phase))
        before, self.phase = self.phase, torch.where(enters, begun, self.phase)
        # A phase's own delimiter within it gives it no second budget.
        self.in_phase = torch.where(enters & (begun != before), 0, self.in_phase + count)
        return (count > 0) & self.plan.is_end(last) | self.closed

    def close_phases(self, added: Block, ended: Tensor) -> tuple[Block, Tensor]:
        """Append a delimiter (`PhasePlan.forced`) in rows whose phase has used up its budget.

        Returns the block and `ended` [R] with the rows added whose segment was closed.
        """
        total = added.lengths
        row = torch.arange(len(total), device=total.device)
        used_up = self.in_phase >= self.tables.budget[row, self.phase]
        full = self.active & ~ended & used_up
        full &= self.out.lengths[self.rows] + total < self.limits[self.rows]
        closer = self.tables.forced[row, self.phase]
        at = torch.arange(added.tokens.shape[1] + 1, device=total.device) == total[:, None]
        at &= full[:, None]

        def with_closer(values: Tensor, of_closer: Tensor | float) -> Tensor:
            return torch.where(at, of_closer, F.pad(values, (0, 1)))

        self.closed = self.closed | (full & self.plan.closes(closer, self.phase))
        self.phase = torch.where(full & ~self.closed, self.plan.opened(closer), self.phase)
        self.in_phase = torch.where(full, 0, self.in_phase)
        added = Block(
            added.rows,
            with_closer(added.tokens, closer[:, None]),
            with_closer(added.slots, FORCED),
            with_closer(added.accepted, 0),
            with_closer(added.logprobs, 0.0),
            total + full,
        )
        return added, ended | self.closed

    def stop_rows(self, added: Block, ended: Tensor) -> tuple[Block, Tensor]:
        """Cut the added tokens after the first token at which a stopping criterion is met.

        Returns the block and `ended` [R] with the stopped rows added.
        """
        assert self.stop is not None
        if self.stop.each is not None:
            added, ended = self._stop_each(self.stop.each, added, ended)
        if self.stop.in_step is not None:
            added, ended = self._stop_in_step(self.stop.in_step, added, ended)
        return added, ended

    def _stop_each(self, stop: Stop, added: Block, ended: Tensor) -> tuple[Block, Tensor]:
        """`stop_rows` for a criterion that needs no other rows."""
        total, stopped = added.lengths.clone(), torch.zeros_like(ended)
        row = torch.arange(len(total), device=total.device)
        for count in range(1, added.tokens.shape[1] + 1):
            asked, new = self.active & ~stopped & (total >= count), torch.full_like(row, count)
            for where, text, _ in self.texts(asked, row, added.tokens, new):
                met = where[stop(text, None)]
                total[met], stopped[met] = count, True
        self.closed = self.closed & ~stopped
        return replace(added, lengths=total), ended | stopped

    def _stop_in_step(self, stop: Stop, added: Block, ended: Tensor) -> tuple[Block, Tensor]:
        """`stop_rows` for a criterion that is asked about all rows of the batch at once."""
        out, rows = self.out, self.rows
        tokens, lengths = out.tokens.clone(), out.lengths.clone()  # with what is added
        columns = torch.arange(added.tokens.shape[1], device=rows.device)
        kept = torch.where(columns < added.lengths[:, None], added.tokens, self.pad_id)
        tokens[rows[:, None], lengths[rows, None] + columns] = kept
        lengths[rows] += added.lengths
        runs = torch.zeros_like(out.finished)
        runs[rows] = self.active & ~ended
        runs &= lengths < self.limits
        width = self.prompts.shape[1]
        source = torch.arange(width, device=rows.device) + self.prompt_lengths[:, None]
        prompts = self.prompts.gather(1, source.remainder(width))  # their padding on the left
        stopped = torch.zeros_like(runs)
        while self.num_in_step < int(lengths[runs].min() if bool(runs.any()) else lengths.max()):
            self.num_in_step += 1
            number = self.num_in_step
            met = torch.as_tensor(
                stop(torch.cat([prompts, tokens[:, :number]], 1), None), device=rows.device
            )
            met = met & (lengths >= number)
            lengths[met], tokens[met, number:] = number, self.pad_id
            runs, stopped = runs & ~met, stopped | met
        self._cut(stopped, lengths)
        left = torch.where(stopped[rows], lengths[rows] - out.lengths[rows], added.lengths)
        self.closed = self.closed & ~stopped[rows]
        return replace(added, lengths=left), ended | stopped[rows]

    def _cut(self, stopped: Tensor, lengths: Tensor) -> None:
        """Leave at most `lengths` [B] tokens of the rows that are `stopped` [B], which then end."""
        out = self.out
        out.lengths = torch.where(stopped, torch.minimum(out.lengths, lengths), out.lengths)
        columns = torch.arange(out.tokens.shape[1], device=lengths.device)
        beyond = stopped[:, None] & (columns >= out.lengths[:, None])
        out.tokens.masked_fill_(beyond, self.pad_id)
        out.slots.masked_fill_(beyond, -1)
        out.logprobs.masked_fill_(beyond, 0.0)
        out.accepted.masked_fill_(beyond, 0)
        out.finished |= stopped
        out.closed &= ~stopped

    def write(self, added: Block, ended: Tensor) -> None:
        """Copy the tokens that a pass added to the output."""
        out, rows = self.out, self.rows
        columns = torch.arange(added.tokens.shape[1], device=rows.device)
        is_kept = columns < added.lengths[:, None]
        where = rows[:, None], out.lengths[rows, None] + columns
        out.tokens[where] = torch.where(is_kept, added.tokens, self.pad_id)
        out.slots[where] = torch.where(is_kept, added.slots, -1)
        out.logprobs[where] = torch.where(is_kept, added.logprobs, 0.0)
        out.accepted[where] = torch.where(is_kept, added.accepted, 0)
        out.lengths[rows] += added.lengths
        out.passes[rows] += self.active.long()
        out.finished[rows] |= self.active & ended & ~self.closed
        out.closed[rows] |= self.active & self.closed
        self.active = self.active & ~ended & (out.lengths[rows] < self.limits[rows])

    def advance(self, added: Block, prefix: Tensor, drafts: Tensor, proposed: Tensor) -> bool:
        """Prepare the next pass; False if no row continues.

        prefix [R]: added tokens that main has already read, as drafts. proposed [R]: the number of
        `drafts` [R, K] that are fed after the unread tokens.
        """
        fresh, columns = added.tokens, torch.arange(added.tokens.shape[1], device=prefix.device)
        if self.drafts.shape[1]:
            fresh = fresh.gather(1, (columns + prefix[:, None]).clamp(max=fresh.shape[1] - 1))
        # An inactive row is fed one token at position 0 until half of the rows are inactive.
        self.start = torch.where(self.active, self.start + self.num_fresh + prefix, 0)
        self.num_fresh = torch.where(self.active, added.lengths - prefix, 1)
        self.num_drafts = torch.where(self.active, proposed, 0)
        num_fed = self.num_fresh + self.num_drafts
        widest_row, farthest_row = num_fed.max(), self.start.max()
        end = widest_row + farthest_row
        counts = (
            self.active.sum(),
            widest_row,
            farthest_row,
            self.num_drafts.max(),
            torch.where(self.active, self.kept_of_block(), 2).min(),
            torch.where(self.active, self.kept_of_block(), 1).max(),
            torch.where(self.active, self.start + num_fed, end).min(),
        )
        self.num_active, widest, farthest, num_drafts, fewest, most, nearest = torch.stack(
            counts
        ).tolist()
        self.all_use_head, self.any_uses_head = fewest > 1, most > 1
        self.is_even = nearest == farthest + widest
        if not self.num_active:
            return False
        self.drafts = drafts[:, :num_drafts]
        if not num_drafts:
            self.draft_source = None
        elif self.draft_source is not None:
            self.draft_source = self.draft_source[:, :num_drafts]
        fed = splice(self.num_fresh, fresh, self.drafts) if num_drafts else fresh
        columns = torch.arange(fed.shape[1], device=fed.device)
        fed = torch.where(columns < num_fed[:, None], fed, self.pad_id)
        self.fed, self.length = fed[:, :widest], farthest + widest
        return True

    def select(self, chosen: Tensor) -> None:
        """Continue with the chosen rows only."""
        self.tables.select(chosen)
        for name in ("rows", "active", "phase", "in_phase", "closed", "start"):
            setattr(self, name, getattr(self, name)[chosen])
        for name in ("fed", "num_fresh", "drafts", "num_drafts"):
            setattr(self, name, getattr(self, name)[chosen])
        if self.draft_source is not None:
            self.draft_source = self.draft_source[chosen]

    def renumber(self) -> None:
        """Make the running rows, which may repeat, all the rows of the batch."""
        kept = self.rows
        self.prompts, self.prompt_lengths = self.prompts[kept], self.prompt_lengths[kept]
        self.limits = self.limits[kept]
        self.out, self.rows = self.out.select(kept), torch.arange(len(kept), device=kept.device)

    def drop_drafts(self, where: Tensor) -> None:
        """Feed no drafts to the next pass in rows that are True in `where` [R]."""
        self.num_drafts = torch.where(where, 0, self.num_drafts)
        widest_row = (self.num_fresh + self.num_drafts).max()
        widest, farthest = torch.stack([widest_row, self.start.max()]).tolist()
        self.fed, self.length = self.fed[:, :widest], farthest + widest
        self.is_even = False

    def decoded(self) -> Decoded:
        """The output, cut to its longest row."""
        out, longest = self.out, int(self.out.lengths.max())
        for name in ("tokens", "slots", "logprobs", "accepted"):
            setattr(out, name, getattr(out, name)[:, :longest])
        return out
