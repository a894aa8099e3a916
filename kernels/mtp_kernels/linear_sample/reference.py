"""`linear_sample` as plain PyTorch on all the logits: the definition."""

import torch
from torch import Tensor

from mtp_kernels.linear_logprob.reference import reference_logits
from mtp_kernels.noise import STREAM_SAMPLE, gumbel


def keep_likely(x: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits [R, V] with minus infinity outside of the top_k largest and of the nucleus top_p.

    The nucleus is the smallest set of largest probabilities, after top_k, whose sum reaches top_p.
    Ties go to the lower id.
    """
    if top_k is None and top_p is None:
        return x
    ranked, order = torch.sort(x, dim=-1, descending=True, stable=True)
    if top_k is not None and top_k < x.shape[-1]:
        ranked = ranked[:, :top_k]
    drop = torch.zeros_like(ranked, dtype=torch.bool)
    if top_p is not None:
        probability = torch.softmax(ranked, -1)
        drop = probability.cumsum(-1) - probability >= top_p
        drop[:, 0] = False
    kept = ranked.masked_fill(drop, -torch.inf)
    return torch.full_like(x, -torch.inf).scatter(-1, order[:, : kept.shape[-1]], kept)


def sample_logits(x: Tensor, seed: Tensor, position: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    """(token, log-prob) [R] of scaled logits [R, V]."""
    noise = 0.0 if greedy else gumbel(seed, position, STREAM_SAMPLE, 0, x.shape[-1])
    token = (x + noise).argmax(-1)
    picked = x.gather(-1, token[:, None])[:, 0]
    return token, (picked - torch.logsumexp(x, -1)).clamp_max(0.0)


def linear_sample_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    position: Tensor,
    temperature: float,
    softcap: float | None,
    top_k: int | None,
    top_p: float | None,
) -> tuple[Tensor, Tensor]:
    """(token, log-prob) [R] of hidden [R, D]; see `linear_sample`. Temperature 0 is greedy."""
    x = reference_logits(hidden, weight, bias, temperature or 1.0, softcap)
    if temperature > 0:
        x = keep_likely(x, top_k, top_p)
    return sample_logits(x, seed, position, temperature == 0)
