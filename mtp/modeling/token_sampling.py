"""How the tokens of a block are drawn, and its drafts judged: from logits, or by a kernel without.

Random numbers are drawn for main's tokens of all running rows first, then for the head's slots of
the rows that use them; for one generator the tokens of a batch are always the same.

Ships with checkpoints: imports torch and siblings only.

Shapes: F rows, J slots or drafts, V vocabulary, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .decode_state import Texts
from .phases import PlanTables
from .records import Slots
from .sampler import MANY_TOKENS, NO_DRAFT, Sampler, Verdict, length_of_prefix, verify

try:
    from mtp_kernels import linear_sample, linear_verify
except ImportError:  # an export works without
    linear_sample = linear_verify = None  # type: ignore[assignment]

Process = Callable[[Tensor, Tensor], Tensor]
"""What a `LogitsProcessor` does: token ids [B, T] and scores [B, V] -> scores [B, V]."""


def processed(process: Process, texts: Texts, scores: Tensor) -> Tensor:
    """Scores [F, V] as a `process` changes them; it is given the rows of one length at a time."""
    out = torch.empty_like(scores)
    for where, text in texts:
        if len(where) == len(scores):
            return process(text, scores)
        out[where] = process(text, scores[where])
    return out


class Ready(NamedTuple):
    """Slots that one read of an output matrix has settled, or only their logits."""

    logits: Tensor | None
    """[F, J, V]; None where a kernel has drawn."""
    drawn: Slots | None

    def part(self, rows: Tensor | slice, slots: slice) -> "Ready":
        """The given slots of the given rows."""
        if self.drawn is not None:
            return Ready(None, Slots(*(part[rows, slots] for part in self.drawn)))
        assert self.logits is not None
        return Ready(self.logits[rows, slots], None)


class Draws:
    """What a batch's tokens are drawn with."""

    def __init__(
        self,
        sampler: Sampler,
        tables: PlanTables,
        weight: Tensor,
        generator: torch.Generator | None,
        process: Process | None,
        kernels: str | None,
    ):
        """For the batch of `tables`, whose main has the output matrix `weight` [V, D]."""
        self.sampler, self.generator, self.process = sampler, generator, process
        self.has_thresholds = tables.has_thresholds
        # Sampled drafts are judged by the distributions that they were drawn from.
        self.keeps_source = tables.has_verified and sampler.temperature > 0
        wants_logits = sampler.truncates or process is not None or self.has_thresholds
        num_rows, device, impl = len(tables.keep), weight.device, None
        if not wants_logits:
            impl = KernelDraws.resolve(kernels, sampler, weight, self.keeps_source)
        self.kernel = (
            None if impl is None else KernelDraws(impl, sampler, num_rows, device, generator)
        )
        self.always_judges = self.keeps_source and self.kernel is not None
        """A pass without drafts is judged too, so that its noise is that beside rows with some."""

    def renew(self, num_rows: int) -> None:
        """Noise of their own for rows of which some are copies of one another."""
        if self.kernel is not None:
            self.kernel.renew(num_rows)

    def ready(self, hidden: Tensor, weight: Tensor, row: Tensor, position: Tensor) -> Ready:
        """Slots of hidden rows [F, J, D] under an output matrix [V, D].

        row [F]: of the batch; position [F]: in its text, of the token of the first slot.
        """
        if self.kernel is None:
            return Ready(hidden @ weight.T, None)
        tokens, logprobs = self.kernel(hidden, weight, row, position)
        source = hidden if self.keeps_source else hidden[..., :0]
        # Nobody asks how likely the likeliest token was: there are no thresholds.
        return Ready(None, Slots(tokens, logprobs, logprobs, source))

    def draw(self, ready: Ready, texts: Callable[[], Texts]) -> Slots:
        """The tokens of slots that are ready; a `process` is given `texts` and a single slot."""
        logits = ready.logits
        if logits is None:
            assert ready.drawn is not None
            return ready.drawn
        if self.process is not None:
            logits = processed(self.process, texts(), logits[:, 0].float())[:, None]
        log_probs = self.sampler.log_probs(logits)
        tokens = self.sampler.choose(logits, log_probs, self.generator)
        logprobs = log_probs.gather(2, tokens[..., None])[..., 0]
        return Slots(
            tokens,
            logprobs,
            log_probs.amax(2) if self.has_thresholds else logprobs,
            log_probs if self.keeps_source else log_probs[..., :0],
        )

    def judge(
        self,
        hidden: Tensor,
        weight: Tensor,
        drafts: Tensor,
        num_drafts: Tensor,
        source: Tensor | None,
        head_weight: Tensor,
        row: Tensor,
        position: Tensor,
        texts: Callable[[int], Texts],
    ) -> Verdict:
        """What main accepts of drafts [F, J], and its token after them.

        hidden [F, J + 1, D] of main, weight [V, D] and head_weight [V, H]; num_drafts [F] of each
        row, of which `source` is `Slots.source`; row and position [F] as in `ready`, of the first
        draft; texts(j): what a `process` is given before draft j.
        """
        if self.kernel is not None:
            return self.kernel.verify(
                hidden, weight, drafts, num_drafts, source, head_weight, row, position
            )
        logits = hidden @ weight.T
        if self.process is not None:
            scores = [
                processed(self.process, texts(j), logits[:, j].float())
                for j in range(drafts.shape[1] + 1)
            ]
            logits = torch.stack(scores, 1)
        return verify(logits, drafts, num_drafts, source, self.sampler, self.generator)


class KernelDraws:
    """Draws tokens and judges drafts from hidden rows, without logits (`mtp_kernels`).

    The noise of a token is a function of its row's seed and its position in the text, so it does
    not depend on the other rows of a batch. It is not what `Sampler.sample` draws from the same
    generator.
    """

    def __init__(
        self,
        impl: str,
        sampler: Sampler,
        num_rows: int,
        device: torch.device,
        generator: torch.Generator | None,
    ):
        self.impl, self.temperature, self.generator = impl, sampler.temperature, generator
        self.device = device
        self.renew(num_rows)

    def renew(self, num_rows: int) -> None:
        """Draw the seeds of a batch's rows, [num_rows]."""
        source = "cpu" if self.generator is None else self.generator.device
        seeds = torch.randint(2**63 - 1, (num_rows,), generator=self.generator, device=source)
        self.seeds = seeds.to(self.device)

    @staticmethod
    def resolve(
        kernels: str | None, sampler: Sampler, weight: Tensor, samples_drafts: bool
    ) -> str | None:
        """The implementation to use with an output matrix [V, D]; None: make logits.

        `auto` takes the kernel, if it is installed, on accelerators, where logits cost memory and
        its launch is one of few, and on a CPU where tokens are sampled from many: its chunks stay
        in the cache, which a softmax of whole rows of logits does not. Not on a CPU where sampled
        drafts are judged: that reads output matrices five times a pass, with logits twice. Raises
        ValueError for a named implementation that is not there.
        """
        if kernels is None:
            return None
        if kernels == "auto":
            pays = weight.device.type != "cpu" or (
                sampler.temperature > 0 and len(weight) >= MANY_TOKENS and not samples_drafts
            )
            return "auto" if pays and linear_sample is not None else None
        if linear_sample is None:
            raise ValueError(f"kernels={kernels} needs the package mtp_kernels, which is missing")
        return kernels

    def __call__(
        self, hidden: Tensor, weight: Tensor, row: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [F, J] int64 and log-probabilities [F, J] float32 of hidden [F, J, D].

        row [F]: of the batch; position [F]: in its text, of the token of the first of the J.
        """
        drawn = linear_sample(
            hidden,
            weight,
            seed=self.seeds[row, None].expand(hidden.shape[:2]),
            position=position[:, None] + torch.arange(hidden.shape[1], device=hidden.device),
            temperature=self.temperature,
            impl=self.impl,
        )
        return drawn.token, drawn.logprob

    def verify(
        self,
        hidden: Tensor,
        weight: Tensor,
        drafts: Tensor,
        num_drafts: Tensor,
        draft_hidden: Tensor | None,
        draft_weight: Tensor,
        row: Tensor,
        position: Tensor,
    ) -> Verdict:
        """What `verify` says, from hidden rows.

        Args:
            hidden: [B, J + 1, D] main's; row j predicts what draft j proposes.
            weight: [V, D] main's output matrix.
            drafts, num_drafts: as in `verify`.
            draft_hidden: [B, J, H] rows that the drafts were drawn from; None if greedy, or if
                there are no drafts.
            draft_weight: [V, H] their output matrix.
            row, position: [B] as in a draw, of the first draft.
        """
        column = torch.arange(drafts.shape[1], device=drafts.device)
        is_draft = column < num_drafts[:, None]
        if self.temperature == 0:
            likeliest, logprobs = self(hidden, weight, row, position)
            accepted = is_draft & (likeliest[:, :-1] == drafts)
            num_accepted = length_of_prefix(accepted)
            return Verdict(num_accepted, likeliest.gather(1, num_accepted[:, None])[:, 0], logprobs)
        given = torch.where(is_draft, drafts, NO_DRAFT)
        if draft_hidden is None:
            # One slot without a draft: the same draw as of such a row beside rows with drafts.
            given = drafts.new_full((len(drafts), 1), NO_DRAFT)
            hidden = hidden.expand(-1, 2, -1)
            draft_hidden = hidden.new_zeros(len(drafts), 1, draft_weight.shape[1])
        num_accepted, token, logprobs = linear_verify(
            hidden,
            weight,
            given,
            draft_hidden,
            draft_weight,
            seed=self.seeds[row],
            position=position,
            temperature=self.temperature,
            impl=self.impl,
        )
        return Verdict(num_accepted, token, logprobs[:, : drafts.shape[1] + 1])
