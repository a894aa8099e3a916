"""The distribution that tokens are sampled from, and main's verification of drafts.

Verification is speculative sampling (Leviathan et al., arXiv 2211.17192): a draft y from
distribution q is accepted with probability min(1, p(y) / q(y)), where p is main's. The first
rejected one is resampled from max(p - q, 0), normalised. The resulting tokens are distributed as p.

Ships with checkpoints: imports torch, and mtp_kernels where that is installed.

Shapes: B rows, F of them, J drafts, V vocabulary, D main width, H width of the head's rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Sampler:
    """The distribution that tokens are sampled from. Replay scores under the same one."""

    temperature: float = 1.0
    """Sampling temperature. 0: greedy; log-probabilities are then those of the unscaled
    distribution."""
    top_k: int = 0
    """Number of likeliest tokens to keep; 0 keeps all."""
    top_p: float = 1.0
    """Probability that the smallest set of likeliest tokens must reach to be kept; 1 keeps all."""
    warpers: tuple[Callable[[Any, Tensor], Tensor], ...] = ()
    """Further rules that drop tokens, after the above, in order: (None, scores [F, V]) -> scores,
    as transformers' logits warpers that do not read the text."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or above, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    @property
    def truncates(self) -> bool:
        """True if some tokens can have probability zero."""
        return self.top_k > 0 or self.top_p < 1 or bool(self.warpers)

    def log_probs(self, logits: Tensor) -> Tensor:
        """[..., V] logits of any dtype -> [..., V] float32 log-probabilities."""
        scores = logits.float()
        if self.temperature > 0:
            scores = scores / self.temperature
        if self.top_k:
            kth = scores.topk(min(self.top_k, scores.shape[-1]), -1).values[..., -1:]
            scores = scores.masked_fill(scores < kth, -torch.inf)
        if self.top_p < 1:
            # Ascending, as in transformers: of equal tokens it drops the same ones.
            ordered, index = scores.sort(-1)
            drop = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            drop[..., -1] = False
            scores = scores.masked_fill(drop.scatter(-1, index, drop), -torch.inf)
        for warper in self.warpers:
            scores = warper(None, scores.flatten(0, -2)).view(scores.shape)
        return scores.log_softmax(-1)

    def choose(
        self,
        logits: Tensor,
        log_probs: Tensor,
        generator: torch.Generator | None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """[..., V] logits and the log-probabilities that `log_probs` makes of them -> [...].

        uniform: [...] noise of each token, see `pick`; None: noise comes from the generator.
        """
        if self.temperature == 0:
            return logits.max(-1).indices  # on a CPU in bfloat16 twice as fast as argmax
        if uniform is not None:
            return pick(log_probs.exp(), uniform)
        flat = log_probs.exp().flatten(0, -2)
        return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])

    def sample(self, logits: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """[..., V] logits -> tokens [...] int64 and their log-probabilities [...] float32."""
        log_probs = self.log_probs(logits)
        tokens = self.choose(logits, log_probs, generator)
        return tokens, log_probs.gather(-1, tokens[..., None])[..., 0]


MAIN, HEAD, ACCEPT, SEGMENT = range(1, 5)
"""Streams of noise: main's tokens, the head's tokens, verdicts on drafts, seeds of later segments.
"""


def _int64(word: int) -> int:
    """The number below 2**63 with the low 64 bits of `word`."""
    return (word + 2**63) % 2**64 - 2**63


_GOLDEN = _int64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = _int64(0xBF58476D1CE4E5B9), _int64(0x94D049BB133111EB)


def mix(seeds: Tensor, counter: Tensor | int, stream: int) -> Tensor:
    """int64 hash of (seed, counter, stream), broadcast: SplitMix64 (Steele et al. 2014)."""
    z = _mixed(seeds + _int64(stream * _GOLDEN))
    step = _int64(counter * _GOLDEN) if isinstance(counter, int) else counter * _GOLDEN
    return _mixed(z + step)


def _mixed(z: Tensor) -> Tensor:
    # int64 wraps as uint64 does; the mask makes the arithmetic shift a logical one.
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def uniforms(seeds: Tensor, position: Tensor, stream: int) -> Tensor:
    """Noise in (0, 1) of tokens, a function of a row's seed and the token's position in its text.

    seeds and position are int64 and broadcast. float64, or float32 on a device without it.
    """
    words = mix(seeds, position, stream) & 0xFFFFFFFFFFFF
    dtype = torch.float32 if seeds.device.type == "mps" else torch.float64
    return (words.to(dtype) + 0.5) * 2.0**-48


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """weights [..., V], at least 0, and uniform [...] in (0, 1) -> [...] int64 sampled index.

    Index i has probability weights[i] over their sum: inversion of the distribution function.
    Unlike `torch.multinomial`, it gives the same index on every machine and does not make the host
    wait for a GPU.
    """
    total = weights.cumsum(-1, dtype=uniform.dtype)
    torch._assert_async(total[..., -1].isfinite().all(), "a probability is inf or nan")
    at = (uniform * total[..., -1])[..., None]
    return torch.searchsorted(total, at, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)


class Verdict(NamedTuple):
    """Result of verifying the drafts of each row."""

    num_accepted: Tensor
    """[B] int64: number of the row's drafts that are accepted."""
    token: Tensor
    """[B] int64: main's own token after them."""
    logprobs: Tensor
    """[B, J + 1] float32: main's log-probability of each draft and, in column num_accepted, of
    `token`."""


def length_of_prefix(holds: Tensor) -> Tensor:
    """[B] number of columns of `holds` [B, J] that are True before the first that is not."""
    return holds.long().cumprod(1).sum(1)


MANY_TOKENS = 1 << 13
"""Vocabulary size from which sampling on a CPU is faster without logits."""


NO_DRAFT = -100
"""Id in place of a missing draft, for `mtp_kernels.linear_verify`."""


def verify(
    logits: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    draft_log_probs: Tensor | None,
    sampler: Sampler,
    generator: torch.Generator | None,
    noise: tuple[Tensor, Tensor] | None = None,
) -> Verdict:
    """Keep the longest prefix of each row's drafts that main accepts, and sample the token after
    it.

    Args:
        logits: [B, J + 1, V] main's; row j predicts what draft j proposes.
        drafts: [B, J] int64.
        num_drafts: [B] int64, at most J; later columns hold no drafts. A row without drafts is
            sampled from its first row of logits.
        draft_log_probs: [B, J, V] float32, the distributions that the drafts were sampled from;
            None if the sampler is greedy.
        sampler: main's sampler. A greedy one accepts a draft if it is main's likeliest token.
        generator: source of randomness.
        noise: in its place, [B, J] uniforms of the verdicts and [B, J + 1] of main's tokens.
    """
    num_rows, width = drafts.shape
    row = torch.arange(num_rows, device=drafts.device)
    is_draft = torch.arange(width, device=drafts.device) < num_drafts[:, None]
    log_p = sampler.log_probs(logits)
    of_draft = log_p[:, :width].gather(2, drafts[..., None])[..., 0]
    if sampler.temperature == 0:
        likeliest = logits.max(-1).indices
        accepted = is_draft & (likeliest[:, :width] == drafts)
        num_accepted = length_of_prefix(accepted)
        token = likeliest[row, num_accepted]
    else:
        assert draft_log_probs is not None
        ratio = of_draft - draft_log_probs.gather(2, drafts[..., None])[..., 0]
        if noise is None:
            uniform = torch.rand(drafts.shape, device=drafts.device, generator=generator)
        else:
            uniform = noise[0]
        accepted = is_draft & (uniform.log() < ratio)
        num_accepted = length_of_prefix(accepted)
        p = log_p[row, num_accepted].exp()
        at = num_accepted.clamp(max=width - 1)
        q = torch.where((num_accepted < num_drafts)[:, None], draft_log_probs[row, at].exp(), 0.0)
        residual = (p - q).clamp(min=0)
        # Where p = q except for rounding the residual is empty, and sampling from p is correct.
        weights = torch.where(residual.sum(1, keepdim=True) > 0, residual, p)
        if noise is None:
            token = torch.multinomial(weights, 1, generator=generator)[:, 0]
        else:
            token = pick(weights, noise[1][row, num_accepted])
    logprob = log_p[row, num_accepted, token]
    padded = torch.nn.functional.pad(of_draft, (0, 1))
    return Verdict(num_accepted, token, padded.scatter(1, num_accepted[:, None], logprob[:, None]))
