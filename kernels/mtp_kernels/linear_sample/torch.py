"""`linear_sample` in chunks of rows: any device, one read of the weight per chunk."""

import torch
from torch import Tensor

from mtp_kernels.dispatch import maybe_compiled, rows_per_chunk
from mtp_kernels.linear_sample.reference import keep_likely, sample_logits
from mtp_kernels.logits import product, scale
from mtp_kernels.noise import STREAM_SAMPLE, gumbel
from mtp_kernels.rowstats import NEGATIVE


def best_of_chunk(
    raw: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    position: Tensor,
    start: int,
    temperature: float,
    softcap: float | None,
    greedy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(best score, its token, its scaled logit, maximum, total) of raw products [R, V].

    start is the vocabulary id of the first column.
    """
    x = scale(raw, bias, softcap, temperature)
    noise = 0.0 if greedy else gumbel(seed, position, STREAM_SAMPLE, start, raw.shape[1])
    score = x + noise
    token = score.argmax(-1)
    maximum = x.amax(-1).clamp_min(NEGATIVE)  # a part may forbid all of its ids
    total = (x - maximum[:, None]).exp().sum(-1)
    picked = x.gather(-1, token[:, None])[:, 0]
    return score.amax(-1), token + start, picked, maximum, total


def best_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    position: Tensor,
    start: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(best score, its token, its scaled logit, maximum, total), each [R], over weight [V, D].

    Ids count from start, the first id of this shard of the vocabulary. Temperature 0 is greedy.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    size = rows_per_chunk(rows, vocab, hidden)
    body = maybe_compiled(best_of_chunk, rows, vocab, sampling=True)
    pieces = []
    for first in range(0, max(rows, 1), max(size, 1)):
        part = slice(first, first + size)
        raw = product(hidden[part], weight)
        scaling = (temperature or 1.0, softcap, temperature == 0)
        pieces.append(body(raw, bias, seed[part], position[part], start, *scaling))
    score, token, picked, maximum, total = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return score, token, picked, maximum, total


def filtered_torch(
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
    """(token, log-prob) with top-k and top-p: exact, by sorting one chunk of logits at a time."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    size = rows_per_chunk(rows, vocab, hidden, buffers=6)
    pieces = []
    for first in range(0, max(rows, 1), max(size, 1)):
        part = slice(first, first + size)
        x = scale(product(hidden[part], weight), bias, softcap, temperature)
        x = keep_likely(x, top_k, top_p)
        pieces.append(sample_logits(x, seed[part], position[part], greedy=False))
    token, logprob = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return token, logprob
