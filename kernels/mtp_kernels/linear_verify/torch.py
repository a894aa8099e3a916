"""Residual resampling in chunks of rows: any device, one read of each weight per chunk."""

import torch
from torch import Tensor

from mtp_kernels.dispatch import maybe_compiled, rows_per_chunk
from mtp_kernels.linear_verify.reference import residual_best
from mtp_kernels.logits import product, scale
from mtp_kernels.rowstats import NEGATIVE


def residual_of_chunk(
    raw_p: Tensor,
    raw_q: Tensor,
    bias_p: Tensor | None,
    bias_q: Tensor | None,
    lse_p: Tensor,
    lse_q: Tensor,
    rejected: Tensor,
    seed: Tensor,
    position: Tensor,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(token, its log p), each [R], of raw products [R, V]."""
    log_p = scale(raw_p, bias_p, softcap, temperature) - lse_p[:, None]
    log_q = scale(raw_q, bias_q, softcap, temperature) - lse_q[:, None]
    nothing = torch.full_like(log_p, -torch.inf)
    log_q = torch.where(rejected[:, None], log_q, nothing)
    score, token, picked = residual_best(log_p, log_q, seed, position, 0)
    _, plain_token, plain_picked = residual_best(log_p, nothing, seed, position, 0)
    empty = score < NEGATIVE / 2
    return torch.where(empty, plain_token, token), torch.where(empty, plain_picked, picked)


def residual_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    draft_hidden: Tensor,
    draft_weight: Tensor,
    draft_bias: Tensor | None,
    draft_lse: Tensor,
    rejected: Tensor,
    seed: Tensor,
    position: Tensor,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(token, its log p), each [R]: sampled from max(p - q, 0) where rejected, else from p."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    size = rows_per_chunk(rows, vocab, hidden, buffers=4)
    body = maybe_compiled(residual_of_chunk, rows, vocab, sampling=True)
    pieces = []
    for first in range(0, max(rows, 1), max(size, 1)):
        part = slice(first, first + size)
        pieces.append(
            body(
                product(hidden[part], weight),
                product(draft_hidden[part], draft_weight),
                bias,
                draft_bias,
                lse[part],
                draft_lse[part],
                rejected[part],
                seed[part],
                position[part],
                temperature,
                softcap,
            )
        )
    token, picked = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return token, picked
