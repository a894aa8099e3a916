"""The pass loop: one forward of main and one block of up to K + 1 tokens at a time, batched.

At the last position of the context (the anchor) main samples t_0 and the head t_1..t_K. A row in a
fast phase keeps all, in a slow phase t_0 only. A block is cut after the first phase delimiter or
end-of-sequence token in it, so no token of a slow phase is ever the head's. Kept tokens go through
main in the next pass, as ordinary tokens.

In a verified phase the head's tokens are drafts. They go through main behind t_0 in the next pass,
which keeps the longest prefix that main accepts and draws its own next token after it: no pass is
spent on verifying alone, and the text follows main's distribution. Rows of one batch may be in
different modes.

Travels with exported checkpoints: imports torch, transformers and siblings only.

Shapes: B rows of the batch, R rows still running, L tokens fed to a pass, J drafts, K head slots,
V vocabulary, D main width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cache_mtp import BlockCache, in_autocast_dtype
from .draws_mtp import Draws, Process, Ready
from .phases_mtp import PhasePlan, PlanTables, check_plans
from .records_mtp import FORCED, Block, Decoded, Slots
from .sampling_mtp import Sampler, Verdict, length_of_prefix

Stop = Callable[[Tensor, Any], Tensor]
"""What a `StoppingCriteria` does: token ids [B, T] and None -> [B] bool."""


@torch.no_grad()
def decode(
    model: Any,
    prompts: Tensor,
    prompt_lengths: Tensor,
    plan: PhasePlan | Sequence[PhasePlan],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    pad_id: int,
    generator: torch.Generator | None = None,
    process: Process | None = None,
    stop: Stop | None = None,
    on_block: Callable[[Block], None] | None = None,
    num_return_sequences: int = 1,
    static_cache: bool = False,
    kernels: str | None = None,
) -> Decoded:
    """Run the pass loop until every row has ended or has `max_new_tokens` tokens.

    Args:
        model: an `MTPMixin` model.
        prompts: [B, T] int64, padded on the right.
        prompt_lengths: [B] int64, at least 1.
        plan: phases, see `PhasePlan`: one for all rows, or one for each. Plans of one batch share
            their delimiters and end tokens.
        sampler: how tokens are drawn.
        max_new_tokens: most tokens a row may get; a last block is cut to it.
        pad_id: fills the unused end of each row.
        generator: source of randomness for sampling.
        process: changes the scores of every slot, main's and the head's, before the sampler. It is
            given the text up to the slot, padded on the left.
        stop: asked after every token, with the text so far, padded on the left; a block is cut
            where it says True.
        on_block: called after each pass.
        num_return_sequences: continuations of each prompt, n. The prompt is read once for all of
            them, and row i of the output continues prompt i // n.
        static_cache: keep keys and values at one length from the first pass on, see `BlockCache`.
        kernels: implementation of `mtp_kernels` that draws tokens and judges drafts without logits,
            `auto` for one where it pays; None: none. Logits are made in any case where something
            else asks for them: top-k and top-p, a `process`, thresholds.

    Raises ValueError for plans that the model cannot follow.
    """
    plans = [plan] * len(prompts) if isinstance(plan, PhasePlan) else list(plan)
    check_plans(plans, len(prompts), model.num_slots, model.config.vocab_size)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if num_return_sequences < 1:
        raise ValueError(f"num_return_sequences must be at least 1, got {num_return_sequences}")
    loop = PassLoop(
        model,
        prompts.repeat_interleave(num_return_sequences, 0),
        prompt_lengths.repeat_interleave(num_return_sequences),
        [plan for plan in plans for _ in range(num_return_sequences)],
        sampler,
        max_new_tokens,
        pad_id,
        generator,
        process,
        stop,
        num_return_sequences,
        static_cache,
        kernels,
    )
    goes_on = True
    while goes_on:
        added, goes_on = loop.run_pass()
        if on_block is not None:
            on_block(added)
    return loop.decoded()


def splice(count: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`count` [R] columns of `first` [R, J], then `second` [R, W], then anything: [R, J + W]."""
    width = first.shape[1]
    if not width:
        return second
    both = torch.cat([first, second], 1)
    column = torch.arange(both.shape[1], device=both.device)
    source = torch.where(column < count[:, None], column, column + width - count[:, None])
    return both.gather(1, source.clamp(max=both.shape[1] - 1))


class PassLoop:
    """A batch between passes."""

    def __init__(
        self,
        model: Any,
        prompts: Tensor,
        prompt_lengths: Tensor,
        plans: list[PhasePlan],
        sampler: Sampler,
        max_new_tokens: int,
        pad_id: int,
        generator: torch.Generator | None,
        process: Process | None,
        stop: Stop | None,
        num_copies: int,
        static_cache: bool = False,
        kernels: str | None = None,
    ):
        device, num_rows = prompts.device, len(prompts)
        self.model, self.plan = model, plans[0]
        self.max_new_tokens, self.pad_id, self.stop = max_new_tokens, pad_id, stop
        self.tables = PlanTables(plans, max_new_tokens + 1, device)
        shared = model.get_output_embeddings().weight
        self.main_weight = in_autocast_dtype(shared)
        self.draws = Draws(sampler, self.tables, self.main_weight, generator, process, kernels)
        self.prompts, self.prompt_lengths = prompts, prompt_lengths
        own = model.head_output_weight()
        self.head_weight = self.main_weight if own is shared else in_autocast_dtype(own)
        self.num_copies = num_copies  # rows next to each other that are still the same
        # Beyond the limit there is room for what a cut drops.
        room = max_new_tokens + 2 * model.num_slots
        # A plan without head slots needs nothing recalled.
        self.recall = model.mtp_head.recall if self.tables.num_head_slots else None
        self.cache = BlockCache(
            model.config.num_hidden_layers + (self.recall is not None),
            num_rows // num_copies,
            prompts.shape[1] + room if static_cache else None,
        )

        # What is written: rows of the batch.
        self.out = Decoded(
            tokens=torch.full((num_rows, room), pad_id, device=device),
            slots=torch.full((num_rows, room), -1, device=device),
            logprobs=torch.zeros(num_rows, room, device=device),
            lengths=torch.zeros(num_rows, dtype=torch.long, device=device),
            passes=torch.zeros(num_rows, dtype=torch.long, device=device),
            finished=torch.zeros(num_rows, dtype=torch.bool, device=device),
            accepted=torch.zeros(num_rows, room, dtype=torch.long, device=device),
            closed=torch.zeros(num_rows, dtype=torch.bool, device=device),
        )

        # Rows still running; `rows` says where they belong in the above.
        self.rows = torch.arange(num_rows, device=device)
        self.active = torch.ones(num_rows, dtype=torch.bool, device=device)
        self.phase = self.plan.phase_after(prompts).gather(1, prompt_lengths[:, None] - 1)[:, 0]
        self.in_phase = torch.zeros_like(prompt_lengths)  # output tokens of the current phase
        self.closed = torch.zeros_like(self.active)  # the segment was closed (`Phase.closed_by`)
        # If the head recalls: messages of what was fed, keys and values of the whole text.
        self.earlier: list[Tensor] = []
        # A pass is fed `num_fresh` tokens that are kept, then `num_drafts` that may be.
        self.fed, self.num_fresh = prompts, prompt_lengths
        self.drafts, self.num_drafts = prompts[:, :0], torch.zeros_like(prompt_lengths)
        self.draft_source: Tensor | None = None  # of sampled drafts, see `Slots`
        self.head_ready: Ready | None = None  # slots made together with main's token
        keep = self.tables.keep[self.rows, self.phase]
        self.all_use_head = bool((keep > 1).all())
        self.start = torch.zeros_like(prompt_lengths)  # position of the first token that is fed
        self.length = prompts.shape[1]  # of the cache after the pass
        self.is_even = bool((prompt_lengths == self.length).all())  # running rows end at `length`

    def run_pass(self) -> tuple[Block, bool]:
        """One pass of all running rows: what it added, and whether any row goes on."""
        hidden, taps = self.read()
        self.head_ready = None
        verdict = self.main_tokens(hidden, taps)
        prefix = verdict.num_accepted
        ended = self.enter_phases(self.drafts, prefix)
        block, block_logprobs, kept, proposed = self.head_tokens(taps, verdict, ended)
        ended |= self.enter_phases(block, kept)

        tokens = splice(prefix, self.drafts, block)
        logprobs = splice(prefix, verdict.logprobs[:, :-1], block_logprobs)
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        of_block = columns - prefix[:, None]
        slots, accepted = of_block.clamp(min=0), torch.where(of_block < 0, columns + 1, 0)
        total = prefix + kept
        if self.tables.has_budgets:
            tokens, slots, total = self.close_phases(tokens, slots, total, ended)
            ended |= self.closed
            logprobs, accepted = (torch.nn.functional.pad(x, (0, 1)) for x in (logprobs, accepted))
            logprobs = torch.where(slots == FORCED, 0.0, logprobs)
            accepted = torch.where(slots == FORCED, 0, accepted)
        if self.stop is not None:
            total, ended = self.stop_rows(tokens, total, ended)
        added = Block(self.rows, tokens, slots, accepted, logprobs, total)
        self.write(added, ended)
        return added, self.advance(added, prefix, block[:, 1:], proposed)

    def read(self) -> tuple[Tensor, list[Tensor]]:
        """Main's forward over what is fed, equal rows once: hidden rows [R, L, D], each tap's."""
        copies, self.num_copies = self.num_copies, 1
        fed, start = self.fed[::copies], self.start[::copies]
        hidden, taps = self.model.main_states(fed, start, self.cache, self.length, self.is_even)
        if self.recall is not None:
            messages = self.model.mtp_head.message(torch.stack(taps, 2))
            states = self.recall.states(messages)
            layer = self.model.config.num_hidden_layers
            self.earlier = [messages, *self.cache.update(*states, layer)]
        if copies == 1:
            return hidden, taps
        source = torch.arange(len(self.rows), device=hidden.device) // copies
        self.cache.select(source)
        self.earlier = [part[source] for part in self.earlier]
        return hidden[source], [tap[source] for tap in taps]

    def heard(self, taps: list[Tensor], at: Tensor) -> tuple[Tensor, Tensor | None]:
        """The message [R, H] at anchors `at` [R] of what was fed, and what the head recalls there
        [R, K, H]: taps [R, L, D] each.
        """
        row = torch.arange(len(at), device=at.device)
        if self.recall is None:
            heard = torch.stack([tap[row, at] for tap in taps], 1)
            return self.model.mtp_head.message(heard), None
        messages, keys, values = self.earlier
        message = messages[row, at]
        return message, self.recall.step(message, self.start + at, keys, values)

    def main_tokens(self, hidden: Tensor, taps: list[Tensor]) -> Verdict:
        """What main accepts of the drafts, and its own token after them: [R, L, D] each."""
        row, at = torch.arange(len(self.rows), device=hidden.device), self.num_fresh - 1
        width, position = self.drafts.shape[1], self.known()

        def text(num_drafts: int) -> Tensor:
            return self.context(row, self.drafts, torch.full_like(at, num_drafts))

        if not width and not self.draws.always_judges:
            rows = self.anchor_rows(hidden[row, at], taps, at)
            ready = self.draws.ready(rows, self.main_weight, self.rows, position)
            if rows.shape[1] > 1:
                self.head_ready = ready.part(slice(None), slice(1, None))
            first = self.draws.draw(ready.part(slice(None), slice(1)), lambda: text(0))
            return Verdict(torch.zeros_like(at), first.tokens[:, 0], first.logprobs)
        columns = at[:, None] + torch.arange(width + 1, device=hidden.device)
        return self.draws.judge(
            hidden[row[:, None], columns.clamp(max=hidden.shape[1] - 1)],
            self.main_weight,
            self.drafts,
            self.num_drafts,
            self.draft_source,
            self.head_weight,
            self.rows,
            position,
            text,
        )

    def anchor_rows(self, hidden: Tensor, taps: list[Tensor], at: Tensor) -> Tensor:
        """Rows that main's output matrix is asked about at the anchors `at` [R]: hidden [R, D].

        Main's own [R, 1, D]. The slots of a parallel head do not wait for main's token: where all
        rows use them and the output matrix is shared, one read of it serves both, [R, 1 + K, D].
        """
        shared = self.head_weight is self.main_weight and not self.model.mtp_head.sequential
        if not (shared and self.all_use_head):
            return hidden[:, None]
        message, recalled = self.heard(taps, at)
        slots = self.model.mtp_head(message, None, recalled)
        return torch.cat([hidden[:, None], slots[:, : self.tables.num_head_slots]], 1)

    def head_tokens(
        self, taps: list[Tensor], verdict: Verdict, ended: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Main's token and, in rows that use it, the head's behind: taps [R, L, D] each.

        ended [R]: rows whose last accepted draft ended the sequence. Returns the block [R, 1 + K]
        and its log-probabilities, how many of its tokens are kept [R] and, of those of the head,
        how many are drafts [R].
        """
        prefix, token = verdict.num_accepted, verdict.token
        runs, width = self.active & ~ended, self.tables.num_head_slots
        if not width and not self.tables.has_budgets:
            # Nothing but main's token, which an active row has room for.
            return token[:, None], verdict.logprobs, runs.long(), torch.zeros_like(prefix)
        row = torch.arange(len(token), device=token.device)
        left = self.max_new_tokens - self.out.lengths[self.rows] - prefix
        block = torch.full((len(token), 1 + width), self.pad_id, device=token.device)
        logprobs = torch.zeros(block.shape, device=token.device)
        block[:, 0], logprobs[:, 0] = token, verdict.logprobs.gather(1, prefix[:, None])[:, 0]
        keep, verified, budget = (
            table[row, self.phase]
            for table in (self.tables.keep, self.tables.verified, self.tables.budget)
        )
        room = torch.minimum(left, budget - self.in_phase)
        num_sure = torch.zeros_like(prefix)
        self.draft_source = None
        if width:
            # A block that already ends at slot 0 needs no head.
            goes_on = runs & ~self.plan.stops(token)
            chosen = ((keep > 1) & goes_on & (~verified | (room > 1))).nonzero()[:, 0]
            if len(chosen):
                at = self.num_fresh - 1 + prefix
                sure = self.tables.sure[chosen, self.phase[chosen], None]
                written = self.head_slots(taps, at, chosen, prefix[chosen], token[chosen], sure)
                end = 1 + written.tokens.shape[1]
                block[chosen, 1:end], logprobs[chosen, 1:end] = written.tokens, written.logprobs
                num_sure[chosen] = length_of_prefix(written.likeliest >= sure)
                if self.draws.keeps_source:
                    shape = (len(token), *written.source.shape[1:])
                    self.draft_source = written.source.new_zeros(shape)
                    self.draft_source[chosen] = written.source
        kept = torch.minimum(torch.where(verified, 1, keep), num_sure + 1)
        kept = torch.minimum(torch.minimum(kept, self.plan.cut(block)), room)
        kept = torch.where(runs, kept, 0)
        proposed = torch.zeros_like(kept)
        if width and self.tables.has_verified:
            drafts = torch.minimum(torch.minimum(keep - 1, num_sure), room - 1)
            drafts = torch.minimum(drafts, self.plan.cut(block[:, 1:]))
            proposed = torch.where(runs & verified, drafts.clamp(min=0), 0)
        return block, logprobs, kept, proposed

    def head_slots(
        self,
        taps: list[Tensor],
        at: Tensor,
        chosen: Tensor,
        prefix: Tensor,
        token: Tensor,
        sure: Tensor,
    ) -> Slots:
        """Sample the head's tokens in `chosen` rows [F] behind t_0, `token` [F].

        taps [R, L, D] each; `at` [R] are the anchors, `prefix` [F] the drafts accepted before t_0.
        Slots that no row is `sure` [F, 1] enough to reach are left out.
        """
        head, width = self.model.mtp_head, self.tables.num_head_slots
        rows, position = self.rows[chosen], self.known()[chosen] + prefix + 1
        ready = None
        if self.head_ready is not None:
            ready = self.head_ready.part(chosen, slice(None))
        else:
            # Of all rows: to choose among them would copy what the head remembers.
            message, recalled = self.heard(taps, at)
            message, recalled = message[chosen], None if recalled is None else recalled[chosen]
            if not head.sequential:
                states = head(message, None, recalled)[:, :width]
                ready = self.draws.ready(states, self.head_weight, rows, position)
        said, state, drawn = token[:, None], None, []

        def text() -> Tensor:
            behind = splice(prefix, self.drafts[chosen], said)
            return self.context(chosen, behind, prefix + said.shape[1])

        if ready is not None and self.draws.process is None:
            return self.draws.draw(ready, text)
        going = torch.ones_like(token, dtype=torch.bool)
        for slot in range(width):
            if ready is None:
                embeds = self.model.head_embed(said[:, -1:])
                hidden, state = head.step(message, embeds, recalled, slot, state)
                one = self.draws.ready(hidden, self.head_weight, rows, position + slot)
            else:
                one = ready.part(slice(None), slice(slot, slot + 1))
            drawn.append(self.draws.draw(one, text))
            if self.tables.has_thresholds:
                going = going & (drawn[-1].likeliest >= sure)[:, 0]
                if not bool(going.any()):
                    break
            said = torch.cat([said, drawn[-1].tokens], 1)
        return Slots.join(drawn)

    def known(self) -> Tensor:
        """[R] tokens of each running row's text, its prompt included."""
        return self.prompt_lengths[self.rows] + self.out.lengths[self.rows]

    def context(self, index: Tensor, extra: Tensor, num_extra: Tensor) -> Tensor:
        """Text of running rows, `index` [F], with `num_extra` [F] tokens of `extra` [F, E] behind.

        Padded on the left: [F, longest].
        """
        rows, known = self.rows[index], self.known()[index]
        text = splice(self.prompt_lengths[rows], self.prompts[rows], self.out.tokens[rows])
        text, length = splice(known, text, extra), known + num_extra
        longest = int(length.max())
        source = torch.arange(longest, device=text.device) - longest + length[:, None]
        return torch.where(source < 0, self.pad_id, text.gather(1, source.clamp(min=0)))

    def enter_phases(self, tokens: Tensor, count: Tensor) -> Tensor:
        """Take note of `count` [R] more tokens of `tokens` [R, J], of which only the last may be a
        delimiter or an end token. Returns [R] bool, True where it ends the row's text.
        """
        if not tokens.shape[1]:
            return torch.zeros_like(self.active)
        last = tokens.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
        begun = self.plan.opened(last)
        enters = (count > 0) & (begun >= 0)
        self.closed = self.closed | ((count > 0) & self.plan.closes(last, self.phase))
        self.phase = torch.where(enters, begun, self.phase)
        self.in_phase = torch.where(enters, 0, self.in_phase + count)
        return (count > 0) & self.plan.is_end(last) | self.closed

    def close_phases(
        self, tokens: Tensor, slots: Tensor, total: Tensor, ended: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write a delimiter (`PhasePlan.forced`) behind the tokens of rows whose phase is used up.

        tokens, slots [R, W] and total [R] -> the same, [R, W + 1] and [R].
        """
        row = torch.arange(len(total), device=total.device)
        used_up = self.in_phase >= self.tables.budget[row, self.phase]
        full = self.active & ~ended & used_up
        full &= self.out.lengths[self.rows] + total < self.max_new_tokens
        closer = self.tables.forced[row, self.phase]
        at = torch.arange(tokens.shape[1] + 1, device=total.device) == total[:, None]
        at &= full[:, None]
        tokens, slots = (torch.nn.functional.pad(x, (0, 1)) for x in (tokens, slots))
        tokens = torch.where(at, closer[:, None], tokens)
        slots = torch.where(at, FORCED, slots)
        self.closed = self.closed | (full & self.plan.closes(closer, self.phase))
        self.phase = torch.where(full & ~self.closed, self.plan.opened(closer), self.phase)
        self.in_phase = torch.where(full, 0, self.in_phase)
        return tokens, slots, total + full

    def stop_rows(self, tokens: Tensor, total: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
        """Cut `tokens` [R, W] after the first at which the stopping criterion is met.

        total, ended [R] -> the same, with rows that it stopped counted as ended.
        """
        assert self.stop is not None
        row, stopped = torch.arange(len(total), device=total.device), torch.zeros_like(ended)
        for count in range(1, tokens.shape[1] + 1):
            told = self.stop(self.context(row, tokens, total.clamp(max=count)), None)
            now = told & self.active & ~stopped & (total >= count)
            total, stopped = torch.where(now, count, total), stopped | now
        self.closed = self.closed & ~stopped
        return total, ended | stopped

    def write(self, added: Block, ended: Tensor) -> None:
        """Copy what a pass added to the output."""
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
        self.active = self.active & ~ended & (out.lengths[rows] < self.max_new_tokens)

    def advance(self, added: Block, prefix: Tensor, drafts: Tensor, proposed: Tensor) -> bool:
        """Prepare the next pass; False if no row goes on.

        prefix [R]: added tokens that main has already read, as drafts. proposed [R]: how many of
        `drafts` [R, K] are fed behind the tokens that it has not.
        """
        fresh, columns = added.tokens, torch.arange(added.tokens.shape[1], device=prefix.device)
        if self.drafts.shape[1]:
            fresh = fresh.gather(1, (columns + prefix[:, None]).clamp(max=fresh.shape[1] - 1))
        # An inactive row is fed one token at position 0 until half of the rows are inactive.
        self.start = torch.where(self.active, self.start + self.num_fresh + prefix, 0)
        self.num_fresh = torch.where(self.active, added.lengths - prefix, 1)
        self.num_drafts = torch.where(self.active, proposed, 0)
        num_fed = self.num_fresh + self.num_drafts
        keep = self.tables.keep.gather(1, self.phase[:, None])[:, 0]
        widest_row, farthest_row = num_fed.max(), self.start.max()
        end = widest_row + farthest_row
        figures = (
            self.active.sum(),
            widest_row,
            farthest_row,
            self.num_drafts.max(),
            torch.where(self.active, keep, 2).min(),
            torch.where(self.active, self.start + num_fed, end).min(),
        )
        num_active, widest, farthest, num_drafts, fewest, nearest = torch.stack(figures).tolist()
        self.all_use_head, self.is_even = fewest > 1, nearest == farthest + widest
        if not num_active:
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
        if 2 * num_active <= len(self.rows):
            self.select(self.active.nonzero()[:, 0])
        return True

    def select(self, chosen: Tensor) -> None:
        """Go on with the chosen rows only."""
        self.cache.select(chosen)
        self.tables.select(chosen)
        for name in ("rows", "active", "phase", "in_phase", "closed", "start"):
            setattr(self, name, getattr(self, name)[chosen])
        for name in ("fed", "num_fresh", "drafts", "num_drafts"):
            setattr(self, name, getattr(self, name)[chosen])
        if self.draft_source is not None:
            self.draft_source = self.draft_source[chosen]

    def decoded(self) -> Decoded:
        """The output, cut to its longest row."""
        out, longest = self.out, int(self.out.lengths.max())
        for name in ("tokens", "slots", "logprobs", "accepted"):
            setattr(out, name, getattr(out, name)[:, :longest])
        return out
