"""The pass loop: one forward of main and one block of up to K + 1 tokens at a time, batched.

At the last position of the context (the anchor) main samples t_0 and the head t_1..t_K. A row in a
fast phase keeps all of them, a row in a slow phase t_0 only. A block is cut after its first phase
delimiter or end-of-sequence token, so the head never writes a token of a slow phase. Kept tokens go
through main in the next pass, as ordinary tokens.

In a verified phase the head's tokens are drafts. They go through main after t_0 in the next pass.
This pass keeps the longest prefix that main accepts and samples main's own next token after it. No
pass is spent on verification alone, and the text follows main's distribution. Rows of one batch may
be in different modes.

Ships with checkpoints: imports torch, transformers and siblings only.

Shapes: B rows of the batch, R rows still running, L tokens fed to a pass, J drafts, K head slots, V
vocabulary, D main width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attention import check_attention
from .cache import BlockCache
from .compiled import CompiledPasses, check_compilable
from .decode_options import DecodableModel, DecodeOptions
from .decode_state import RunningRows, Texts, splice
from .phases import PhasePlan, check_plans
from .records import Block, Decoded, Slots
from .sampler import Verdict, length_of_prefix
from .token_sampling import Settled, TokenSampler


@torch.no_grad()
def decode(
    model: DecodableModel,
    prompts: Tensor,
    prompt_lengths: Tensor,
    plan: PhasePlan | Sequence[PhasePlan],
    options: DecodeOptions,
    *,
    on_block: Callable[[Block], None] | None = None,
    num_return_sequences: int = 1,
) -> Decoded:
    """Run the pass loop until every row has ended or has reached its limit.

    Args:
        model: an `MTPMixin` model.
        prompts: [B, T] int64, padded on the right.
        prompt_lengths: [B] int64, at least 1.
        plan: phases, see `PhasePlan`: one for all rows, or one for each. Plans of one batch share
            their delimiters and end tokens.
        options: sampler, limits and the rest, see `DecodeOptions`.
        on_block: called after each pass.
        num_return_sequences: continuations of each prompt, n. The prompt is read once for all of
            them, and row i of the output continues prompt i // n.

    Raises ValueError for plans that the model cannot follow.
    """
    plans = [plan] * len(prompts) if isinstance(plan, PhasePlan) else list(plan)
    check_plans(plans, len(prompts), model.block_size, model.config.vocab_size)
    options.check()
    if options.compiler is not None:
        check_compilable(model)
    if num_return_sequences < 1:
        raise ValueError(f"num_return_sequences must be at least 1, got {num_return_sequences}")
    loop = PassLoop(
        model,
        prompts.repeat_interleave(num_return_sequences, 0),
        prompt_lengths.repeat_interleave(num_return_sequences),
        [plan for plan in plans for _ in range(num_return_sequences)],
        options,
        num_return_sequences,
    )
    continues = True
    while continues:
        added, continues = loop.run_pass()
        if on_block is not None:
            on_block(added)
        if options.any_continues is not None:
            others_continue = options.any_continues(continues)
            if others_continue and not continues:
                idle(model, options)
    if loop.compiled is not None:
        loop.compiled.close()
    return loop.running.decoded()


@torch.no_grad()
def idle(model: DecodableModel, options: DecodeOptions) -> None:
    """Run passes over one token, with nothing to write, until no process continues."""
    assert options.any_continues is not None
    token = torch.full((1, 1), options.pad_id, device=next(model.parameters()).device)
    goes_on = True
    while goes_on:
        cache = BlockCache(model.main_config.num_hidden_layers, 1, 1)
        model.main_states(token, torch.zeros_like(token[0]), cache, 1, with_taps=False)
        goes_on = options.any_continues(False)


class PassLoop:
    """Samples the blocks of a batch from main and the head, pass by pass."""

    def __init__(
        self,
        model: DecodableModel,
        prompts: Tensor,
        prompt_lengths: Tensor,
        plans: list[PhasePlan],
        options: DecodeOptions,
        num_copies: int = 1,
    ):
        """num_copies: number of adjacent rows that are identical, and are read once."""
        self.model = model
        limits = options.max_new_tokens, options.limits, options.pad_id, options.stop
        self.running = RunningRows(prompts, prompt_lengths, plans, *limits)
        self.plan, self.tables = self.running.plan, self.running.tables
        check_attention(model)
        main, head = model.output_layers()
        self.main_output = main.in_autocast_dtype()
        self.head_output = self.main_output if head is main else head.in_autocast_dtype()
        self.samples = TokenSampler(options, self.tables, self.main_output, self.head_output)
        self.num_copies = num_copies  # adjacent rows that are still identical
        self.waits_for_rows = self.main_output.weight.device.type == "cpu"
        self.head = model.mtp_head
        # A plan without head slots needs no head state.
        num_cache_layers = self.head.num_cache_layers if self.tables.num_head_slots else 0
        self.cache = BlockCache(
            model.main_config.num_hidden_layers,
            len(prompts) // num_copies,
            prompts.shape[1] + self.running.room,
            options.static_cache,
            num_cache_layers,
        )
        self.compiler = options.compiler
        self.compiled: CompiledPasses | None = None  # after the prompts' pass, if it is asked for
        self.observed: list[Tensor] = []  # the head's observations of the last pass
        self.head_settled: Settled | None = None  # slots computed together with main's token

    def run_pass(self) -> tuple[Block, bool]:
        """One pass of all running rows: the tokens that it added, and whether any row continues."""
        running = self.running
        hidden = self.read()
        self.head_settled = None
        verdict = self.main_tokens(hidden)
        prefix, drafts = verdict.num_accepted, running.drafts
        ended = running.enter_phases(drafts, prefix)
        block, block_logprobs, kept, proposed = self.head_tokens(verdict, ended)
        ended |= running.enter_phases(block, kept)

        tokens = splice(prefix, drafts, block)
        logprobs = splice(prefix, verdict.logprobs[:, :-1], block_logprobs)
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        of_block = columns - prefix[:, None]
        slots, accepted = of_block.clamp(min=0), torch.where(of_block < 0, columns + 1, 0)
        added = Block(running.rows, tokens, slots, accepted, logprobs, prefix + kept)
        if self.tables.has_budgets:
            added, ended = running.close_phases(added, ended)
        if running.stop is not None:
            added, ended = running.stop_rows(added, ended)
        running.write(added, ended)
        goes_on = running.advance(added, prefix, block[:, 1:], proposed)
        if goes_on and 2 * running.num_active <= len(running.rows):
            chosen = running.active.nonzero()[:, 0]
            self.cache.select(chosen)
            if self.compiled is not None:
                self.compiled.select(chosen)
            running.select(chosen)
        return added, goes_on

    def read(self) -> Tensor:
        """Main's forward over the fed tokens: hidden rows [R, L, D].

        Identical rows are read once. The head observes the pass if some row uses it.
        """
        running = self.running
        copies, self.num_copies = self.num_copies, 1
        fed, start = running.fed[::copies], running.start[::copies]
        last = start + (running.num_fresh + running.num_drafts)[::copies] - 1
        with_taps, block_size = self.tables.num_head_slots > 0, self.tables.num_head_slots + 1
        if self.compiler is not None and self.compiled is None and self.cache.length:
            num_rows = len(running.prompts)
            self.compiled = CompiledPasses(
                self.model, self.compiler, self.cache, num_rows, block_size
            )
        if self.compiled is None:
            hidden, taps = self.model.main_states(
                fed,
                start,
                self.cache,
                running.length,
                is_even=running.is_even,
                with_taps=with_taps,
                last=last,
            )
        else:
            hidden, taps = self.compiled.read(fed, start, last, with_taps)
            # The head's layers stay in the loop's own cache.
            positions = start[:, None] + torch.arange(fed.shape[1], device=fed.device)
            self.cache.place(positions, running.length, running.is_even)
        if taps:
            self.observed = self.head.observe(
                taps, fed, start, self.model.head_embed, self.remember
            )
        if copies == 1:
            return hidden
        source = torch.arange(len(running.rows), device=hidden.device) // copies
        self.cache.select(source)
        self.observed = [part[source] for part in self.observed]
        return hidden[source]

    def remember(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `heads.Remember`."""
        kept: tuple[Tensor, Tensor] = self.cache.head_layers[layer].update(keys, values)
        return kept

    def context(self, at: Tensor) -> list[Tensor]:
        """The head's context at anchors `at` [R] among the fed tokens."""
        return self.head.context(self.observed, at, self.running.start + at)

    def main_tokens(self, hidden: Tensor) -> Verdict:
        """The drafts that main accepts, and its own token after them: hidden [R, L, D]."""
        running = self.running
        row, at = torch.arange(len(running.rows), device=hidden.device), running.num_fresh - 1
        width, position = running.drafts.shape[1], running.known()

        def texts(num_drafts: int) -> Texts:
            asked = running.active & (running.num_drafts >= num_drafts)
            asked &= ~self.plan.is_end(running.drafts[:, :num_drafts]).any(1)
            return running.texts(asked, row, running.drafts, torch.full_like(at, num_drafts))

        if not width and not self.samples.always_verifies:
            rows = self.anchor_rows(hidden[row, at], at)
            settled = self.samples.settle(rows, self.main_output, running.rows, position, True)
            if rows.shape[1] > 1:
                self.head_settled = settled.part(slice(None), slice(1, None))
            first = self.samples.sample(settled.part(slice(None), slice(1)), lambda: texts(0))
            return Verdict(torch.zeros_like(at), first.tokens[:, 0], first.logprobs)
        columns = at[:, None] + torch.arange(width + 1, device=hidden.device)
        return self.samples.verify(
            hidden[row[:, None], columns.clamp(max=hidden.shape[1] - 1)],
            running.drafts,
            running.num_drafts,
            running.draft_source,
            running.rows,
            position,
            texts,
        )

    def anchor_rows(self, hidden: Tensor, at: Tensor) -> Tensor:
        """Rows for main's output layer at the anchors `at` [R]: hidden [R, D].

        Main's own row is [R, 1, D]. The slots of a parallel head do not depend on main's token:
        where all rows use them and the output layer is shared, one read of it serves both, [R, 1 +
        K, D].
        """
        shared = self.head_output is self.main_output and not self.head.sequential
        if not (shared and self.running.all_use_head):
            return hidden[:, None]
        slots = self.head(self.context(at), None)
        return torch.cat([hidden[:, None], slots[:, : self.tables.num_head_slots]], 1)

    def head_tokens(self, verdict: Verdict, ended: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Main's token and, in rows that use the head, the head's after it.

        ended [R]: rows whose last accepted draft ended the sequence. Returns the block [R, 1 + K],
        its log-probabilities, the number of its tokens that are kept [R] and the number of the
        head's tokens that are drafts [R].
        """
        running = self.running
        prefix, token = verdict.num_accepted, verdict.token
        runs, width = running.active & ~ended, self.tables.num_head_slots
        if not width and not self.tables.has_budgets:
            # Only main's token, for which an active row has room.
            return token[:, None], verdict.logprobs, runs.long(), torch.zeros_like(prefix)
        row = torch.arange(len(token), device=token.device)
        left = running.limits[running.rows] - running.out.lengths[running.rows] - prefix
        block = torch.full((len(token), 1 + width), running.pad_id, device=token.device)
        logprobs = torch.zeros(block.shape, device=token.device)
        block[:, 0], logprobs[:, 0] = token, verdict.logprobs.gather(1, prefix[:, None])[:, 0]
        keep, verified, budget = (
            table[row, running.phase]
            for table in (self.tables.keep, self.tables.verified, self.tables.budget)
        )
        room = torch.minimum(left, budget - running.in_phase)
        num_likely = torch.zeros_like(prefix)
        running.draft_source = None
        if width:
            # A block that already ends at slot 0 needs no head.
            goes_on = runs & ~self.plan.stops(token)
            uses = (keep > 1) & goes_on & (~verified | (room > 1))
            chosen = self.rows_of(uses)
            if len(chosen):
                at = running.num_fresh - 1 + prefix
                floor = self.tables.min_logprob[chosen, running.phase[chosen], None]
                written = self.head_slots(at, chosen, prefix[chosen], token[chosen], floor)
                end, used = 1 + written.tokens.shape[1], uses[chosen]
                likely = (written.likeliest >= floor) & used[:, None]
                block[chosen, 1:end] = torch.where(used[:, None], written.tokens, running.pad_id)
                logprobs[chosen, 1:end] = torch.where(used[:, None], written.logprobs, 0.0)
                num_likely[chosen] = length_of_prefix(likely)
                if self.samples.keeps_source:
                    shape = (len(token), *written.source.shape[1:])
                    running.draft_source = written.source.new_zeros(shape)
                    running.draft_source[chosen] = written.source
        kept = torch.minimum(torch.where(verified, 1, keep), num_likely + 1)
        kept = torch.minimum(torch.minimum(kept, self.plan.cut(block)), room)
        kept = torch.where(runs, kept, 0)
        proposed = torch.zeros_like(kept)
        if width and self.tables.has_verified:
            drafts = torch.minimum(torch.minimum(keep - 1, num_likely), room - 1)
            drafts = torch.minimum(drafts, self.plan.cut(block[:, 1:]))
            proposed = torch.where(runs & verified, drafts.clamp(min=0), 0)
        return block, logprobs, kept, proposed

    def rows_of(self, uses: Tensor) -> Tensor:
        """Indices of the running rows that the head writes for, given those that use it [R] bool.

        On an accelerator it writes for all rows as soon as one may use it: to find out which do
        would mean to wait for the pass, as processors do anyway.
        """
        if self.waits_for_rows or self.samples.process is not None:
            return uses.nonzero()[:, 0]
        return torch.arange(len(uses) if self.running.any_uses_head else 0, device=uses.device)

    def head_slots(
        self,
        at: Tensor,
        chosen: Tensor,
        prefix: Tensor,
        token: Tensor,
        floor: Tensor,
    ) -> Slots:
        """Sample the head's tokens after t_0, `token` [F], in `chosen` rows [F].

        `at` [R] are the anchors, `prefix` [F] the number of drafts accepted before t_0. Sampling
        stops after a slot whose likeliest token is below `floor` [F, 1] in every row.
        """
        running = self.running
        width = self.tables.num_head_slots
        rows, position = running.rows[chosen], running.known()[chosen] + prefix + 1
        settled = None
        if self.head_settled is not None:
            settled = self.head_settled.part(chosen, slice(None))
        else:
            # For all rows: selecting some would copy the head's state.
            context = [part[chosen] for part in self.context(at)]
            if not self.head.sequential:
                states = self.head(context, None)[:, :width]
                settled = self.samples.settle(states, self.head_output, rows, position)
        block, state, slots = token[:, None], None, []

        def texts() -> Texts:
            behind = splice(prefix, running.drafts[chosen], block)
            asked = ~self.plan.stops(block).any(1)
            return running.texts(asked, chosen, behind, prefix + block.shape[1])

        if settled is not None and self.samples.process is None:
            return self.samples.sample(settled, texts)
        continues = torch.ones_like(token, dtype=torch.bool)
        for slot in range(width):
            if settled is None:
                embeds = self.model.head_embed(block[:, -1:])
                hidden, state = self.head.step(context, embeds, slot, state)
                one = self.samples.settle(hidden, self.head_output, rows, position + slot)
            else:
                one = settled.part(slice(None), slice(slot, slot + 1))
            slots.append(self.samples.sample(one, texts, by_head=True))
            if self.tables.has_thresholds:
                continues = continues & (slots[-1].likeliest >= floor)[:, 0]
                if not bool(continues.any()):
                    break
            block = torch.cat([block, slots[-1].tokens], 1)
        return Slots.join(slots)
