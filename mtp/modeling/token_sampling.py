"""Sampling of a block's tokens and verification of its drafts: from logits, or by a kernel.

Without seeds of the rows, random numbers are sampled for main's tokens of all running rows first,
then for the head's slots of the rows that use them; with one generator the tokens of a batch are
reproducible.

Ships with checkpoints: imports torch and siblings only.

Shapes: F rows, J slots or drafts, V vocabulary, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .decode_options import DecodeOptions, Process
from .decode_state import Texts
from .output_layer import OutputLayer
from .phases import PlanTables
from .records import Slots
from .sampler import (
    ACCEPT,
    HEAD,
    MAIN,
    MANY_TOKENS,
    NO_DRAFT,
    Sampler,
    Verdict,
    length_of_prefix,
    uniforms,
    verify,
)

try:
    from mtp_kernels import linear_sample, linear_verify
except ImportError:  # an export works without
    linear_sample = linear_verify = None  # type: ignore[assignment]


def processed(process: Process, texts: Texts, scores: Tensor) -> Tensor:
    """Scores [F, V] as a `process` changes them; it receives rows of one length at a time.

    Rows without a text keep their scores.
    """
    out = scores.clone()
    for where, text, padding in texts:
        if len(where) == len(scores):
            return process(text, scores, padding=padding)
        out[where] = process(text, scores[where], padding=padding)
    return out


class Settled(NamedTuple):
    """Slots after one read of an output layer: their tokens, or their logits only."""

    logits: Tensor | None
    """[F, J, V] logits; None if a kernel has sampled."""
    sampled: Slots | None
    """The slots that a kernel has sampled; None if there are logits."""
    noise: Tensor | None = None
    """[F, J] uniforms of the slots, if rows have seeds and there are logits."""

    def part(self, rows: Tensor | slice, slots: slice) -> "Settled":
        """The given slots of the given rows."""
        if self.sampled is not None:
            return Settled(None, Slots(*(part[rows, slots] for part in self.sampled)))
        assert self.logits is not None
        noise = None if self.noise is None else self.noise[rows, slots]
        return Settled(self.logits[rows, slots], None, noise)


class TokenSampler:
    """Samples the tokens of a batch, main's and the head's, and verifies drafts."""

    def __init__(
        self,
        options: DecodeOptions,
        tables: PlanTables,
        main: OutputLayer,
        head: OutputLayer,
    ):
        """For the batch of `tables` and the output layers of main and of the head."""
        self.main, self.head = main, head
        sampler, generator, process = options.sampler, options.generator, options.process
        self.sampler, self.generator, self.process = sampler, generator, process
        self.has_thresholds = tables.has_thresholds
        # Sampled drafts are verified by the distributions that they were sampled from.
        self.keeps_source = tables.has_verified and sampler.temperature > 0
        wants_logits = sampler.truncates or process is not None or self.has_thresholds
        # The kernel verifies under one softcap and one vocabulary, main's and the head's.
        differ = main.softcap != head.softcap or head.tokens is not None
        wants_logits |= self.keeps_source and differ
        num_rows, device, impl = len(tables.keep), main.weight.device, None
        if not wants_logits:
            impl = KernelTokenSampler.resolve(options.impl, sampler, main.weight, self.keeps_source)
        self.seeds = options.seeds
        if self.seeds is not None and self.seeds.shape != (num_rows,):
            raise ValueError(
                f"seeds must be one for each of {num_rows} rows, got {list(self.seeds.shape)}"
            )
        self.kernel = (
            None
            if impl is None
            else KernelTokenSampler(impl, sampler, num_rows, device, generator, self.seeds)
        )
        if self.seeds is not None:
            self.seeds = self.seeds.to(device)
        self.always_verifies = self.keeps_source and self.kernel is not None
        """True if a pass without drafts is verified too, so that a row's noise does not depend on
        its neighbours."""

    def renew(self, num_rows: int) -> None:
        """Sample separate noise for each row, since some rows are copies of one another."""
        if self.kernel is not None:
            self.kernel.renew(num_rows)

    def settle(
        self,
        hidden: Tensor,
        output: OutputLayer,
        row: Tensor,
        position: Tensor,
        by_main: bool = False,
    ) -> Settled:
        """Slots of hidden rows [F, J, D] under an output layer.

        row [F]: index in the batch; position [F]: index in its text of the first slot's token,
        which is main's if `by_main`; all others are the head's.
        """
        if self.kernel is None:
            noise = None if self.seeds is None else self.noise(row, position, hidden, by_main)
            return Settled(output.logits(hidden), None, noise)
        tokens, logprobs = self.kernel(hidden, output, row, position)
        source = hidden if self.keeps_source else hidden[..., :0]
        # The log-probability of the likeliest token is not needed: there are no thresholds.
        return Settled(None, Slots(tokens, logprobs, logprobs, source))

    def noise(self, row: Tensor, position: Tensor, hidden: Tensor, by_main: bool) -> Tensor:
        """[F, J] uniforms of the slots that `settle` is given."""
        assert self.seeds is not None
        seeds, column = self.seeds[row, None], torch.arange(hidden.shape[1], device=row.device)
        if not by_main:
            return uniforms(seeds, position[:, None] + column, HEAD)
        first = uniforms(seeds, position[:, None], MAIN)
        if hidden.shape[1] == 1:
            return first
        return torch.cat([first, uniforms(seeds, position[:, None] + column[1:], HEAD)], 1)

    def sample(self, settled: Settled, texts: Callable[[], Texts], by_head: bool = False) -> Slots:
        """The tokens of settled slots; a `process` receives `texts` and a single slot.

        by_head: whether the slot is the head's. A `process` may leave it no token, where the only
        ones that it allows are outside the head's vocabulary: `likeliest` is then NaN, which ends
        the block before the slot.
        """
        logits = settled.logits
        if logits is None:
            assert settled.sampled is not None
            return settled.sampled
        has_none = None
        if self.process is not None:
            logits = processed(self.process, texts(), logits[:, 0].float())[:, None]
            if by_head:
                has_none = logits.amax(2) == -torch.inf
                logits = logits.masked_fill(has_none[..., None], 0.0)
        log_probs = self.sampler.log_probs(logits)
        tokens = self.sampler.choose(logits, log_probs, self.generator, settled.noise)
        logprobs = log_probs.gather(2, tokens[..., None])[..., 0]
        likeliest = log_probs.amax(2) if self.has_thresholds else logprobs
        if has_none is not None:
            likeliest = likeliest.masked_fill(has_none, torch.nan)
        return Slots(
            tokens,
            logprobs,
            likeliest,
            log_probs if self.keeps_source else log_probs[..., :0],
        )

    def verify(
        self,
        hidden: Tensor,
        drafts: Tensor,
        num_drafts: Tensor,
        source: Tensor | None,
        row: Tensor,
        position: Tensor,
        texts: Callable[[int], Texts],
    ) -> Verdict:
        """The drafts [F, J] that main accepts, and its token after them.

        hidden [F, J + 1, D]: main's rows; num_drafts [F]: drafts of each row; source: their
        `Slots.source`; row and position [F]: as in `settle`, for the first draft; texts(j): the
        texts that a `process` receives before draft j.
        """
        if self.kernel is not None:
            return self.kernel.verify(
                hidden, self.main, drafts, num_drafts, source, self.head, row, position
            )
        logits = self.main.logits(hidden)
        if self.process is not None:
            scores = [
                processed(self.process, texts(j), logits[:, j].float())
                for j in range(drafts.shape[1] + 1)
            ]
            logits = torch.stack(scores, 1)
        noise = None
        if self.seeds is not None:
            at = position[:, None] + torch.arange(drafts.shape[1] + 1, device=drafts.device)
            seeds = self.seeds[row, None]
            noise = uniforms(seeds, at[:, :-1], ACCEPT), uniforms(seeds, at, MAIN)
        return verify(logits, drafts, num_drafts, source, self.sampler, self.generator, noise)


class KernelTokenSampler:
    """Samples tokens and verifies drafts from hidden rows, without logits (`mtp_kernels`).

    The noise of a token is a function of its row's seed and its position in the text, so it does
    not depend on the other rows of a batch. It differs from the noise of `Sampler.sample` with the
    same generator.
    """

    def __init__(
        self,
        impl: str,
        sampler: Sampler,
        num_rows: int,
        device: torch.device,
        generator: torch.Generator | None,
        seeds: Tensor | None = None,
    ):
        self.impl, self.temperature, self.generator = impl, sampler.temperature, generator
        self.device = device
        if seeds is None:
            self.renew(num_rows)
        else:
            self.seeds = seeds.to(device)

    def renew(self, num_rows: int) -> None:
        """Sample the seeds of a batch's rows, [num_rows]."""
        source = "cpu" if self.generator is None else self.generator.device
        seeds = torch.randint(2**63 - 1, (num_rows,), generator=self.generator, device=source)
        self.seeds = seeds.to(self.device)

    @staticmethod
    def resolve(
        impl: str | None, sampler: Sampler, weight: Tensor, samples_drafts: bool
    ) -> str | None:
        """The implementation to use with an output matrix [V, D]; None: compute logits.

        `auto` takes the kernel, if it is installed, on accelerators, where logits cost memory and
        launches dominate. On a CPU it takes it for a large vocabulary: its chunks stay in the
        cache, unlike a softmax over whole rows of logits. It does not on a CPU where sampled drafts
        are verified, since that reads output matrices five times per pass, and twice with logits.
        Raises ValueError for a named implementation that is not installed.
        """
        if impl is None:
            return None
        if impl == "auto":
            pays = weight.device.type != "cpu" or (
                sampler.temperature > 0 and len(weight) >= MANY_TOKENS and not samples_drafts
            )
            return "auto" if pays and linear_sample is not None else None
        if linear_sample is None:
            raise ValueError(
                f"impl={impl} (key kernels of a run) needs the package mtp_kernels, "
                "which is missing; install it or use auto"
            )
        return impl

    def __call__(
        self, hidden: Tensor, output: OutputLayer, row: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [F, J] int64 and log-probabilities [F, J] float32 of hidden [F, J, D].

        row [F]: index in the batch; position [F]: index in its text of the first of the J tokens.
        """
        sampled = linear_sample(
            output.rows(hidden),
            output.weight,
            **output.options,
            seed=self.seeds[row, None].expand(hidden.shape[:2]),
            position=position[:, None] + torch.arange(hidden.shape[1], device=hidden.device),
            temperature=self.temperature,
            impl=self.impl,
        )
        return output.ids_of(sampled.token), sampled.logprob

    def verify(
        self,
        hidden: Tensor,
        output: OutputLayer,
        drafts: Tensor,
        num_drafts: Tensor,
        draft_hidden: Tensor | None,
        draft_output: OutputLayer,
        row: Tensor,
        position: Tensor,
    ) -> Verdict:
        """The verdict of `sampler.verify`, from hidden rows.

        Args:
            hidden: [B, J + 1, D] main's; row j predicts what draft j proposes.
            output: main's output layer.
            drafts, num_drafts: as in `verify`.
            draft_hidden: [B, J, H] rows that the drafts were sampled from; None if greedy, or if
                there are no drafts.
            draft_output: their output layer, with the same softcap.
            row, position: [B] as in sampling, for the first draft.
        """
        column = torch.arange(drafts.shape[1], device=drafts.device)
        is_draft = column < num_drafts[:, None]
        if self.temperature == 0:
            likeliest, logprobs = self(hidden, output, row, position)
            accepted = is_draft & (likeliest[:, :-1] == drafts)
            num_accepted = length_of_prefix(accepted)
            return Verdict(num_accepted, likeliest.gather(1, num_accepted[:, None])[:, 0], logprobs)
        given = torch.where(is_draft, drafts, NO_DRAFT)
        if draft_hidden is None:
            # One slot without a draft gives the same sample as such a row next to rows with drafts.
            given = drafts.new_full((len(drafts), 1), NO_DRAFT)
            hidden = hidden.expand(-1, 2, -1)
            draft_hidden = hidden.new_zeros(len(drafts), 1, draft_output.weight.shape[1])
        num_accepted, token, logprobs = linear_verify(
            output.rows(hidden),
            output.weight,
            given,
            draft_output.rows(draft_hidden),
            draft_output.weight,
            **output.options,
            draft_bias=draft_output.bias,
            seed=self.seeds[row],
            position=position,
            temperature=self.temperature,
            impl=self.impl,
        )
        return Verdict(num_accepted, token, logprobs[:, : drafts.shape[1] + 1])
