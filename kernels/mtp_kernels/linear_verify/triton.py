"""Residual resampling in Triton: both distributions' logits tile by tile, vocabulary as M.

Both log-sum-exps are known when this runs, so one pass scores max(p - q, 0) and, for rows without
a rejected draft and for rows whose residual rounds to nothing, p itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_kernels.configs import config_for, split_grid
from mtp_kernels.noise import STREAM_RESIDUAL
from mtp_kernels.rowstats import NEGATIVE, combine_best
from mtp_kernels.tiles import (
    NEG,
    VARYING,
    aligned,
    check_triton,
    gumbel_tile,
    launch,
    logits_tile,
    scaling_options,
    tile_options,
)


@triton.jit(do_not_specialize=VARYING)
def residual_kernel(
    hidden,
    weight,
    bias,
    lse,
    draft_hidden,
    draft_weight,
    draft_bias,
    draft_lse,
    rejected,
    seed,
    position,
    floats,
    tokens,
    num_rows,
    vocab,
    depth,
    draft_depth,
    tiles_per_split,
    softcap,
    inverse_temperature,
    STREAM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DRAFT_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    T: tl.constexpr,
):
    """Floats [splits, 2, 2, R] = best score and its log p, tokens [splits, 2, R]: residual, p."""
    BR: tl.constexpr = T.rows
    BV: tl.constexpr = T.vocab
    split = tl.program_id(1).to(tl.int64)
    row_start = tl.program_id(0) * BR
    rows = row_start + tl.arange(0, BR)
    row_inside = rows < num_rows
    safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    key = tl.load(seed + safe_rows)[None, :]
    where = tl.load(position + safe_rows)[None, :]
    p_lse = tl.load(lse + safe_rows)[None, :]
    q_lse = tl.load(draft_lse + safe_rows)[None, :]
    use_draft = tl.load(rejected + safe_rows)[None, :] != 0
    best = tl.full((BR,), float("-inf"), tl.float32)
    token = tl.zeros((BR,), tl.int32)
    picked = tl.zeros((BR,), tl.float32)
    plain_best = tl.full((BR,), float("-inf"), tl.float32)
    plain_token = tl.zeros((BR,), tl.int32)
    plain_picked = tl.zeros((BR,), tl.float32)
    first = tl.program_id(1) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(vocab, BV))
    for tile in range(first, last):
        column = tl.arange(0, BV)
        ids = tile * BV + column
        inside = (ids < vocab)[:, None]
        log_p = logits_tile(
            hidden, weight, bias, row_start, tile * BV, num_rows, vocab, depth,
            softcap, inverse_temperature, True, HAS_BIAS, HAS_SOFTCAP, T,
        ) - p_lse  # fmt: skip
        log_q = logits_tile(
            draft_hidden, draft_weight, draft_bias, row_start, tile * BV, num_rows, vocab,
            draft_depth, softcap, inverse_temperature, True, HAS_DRAFT_BIAS, HAS_SOFTCAP, T,
        ) - q_lse  # fmt: skip
        residual = tl.exp(log_p) - tl.where(use_draft, tl.exp(log_q), 0.0)
        noise = gumbel_tile(key, where, STREAM, ids[:, None])
        score = tl.where(residual > 0, tl.log(tl.maximum(residual, 2e-38)) + noise, NEG)
        score = tl.where(inside, score, float("-inf"))
        plain = tl.where(inside, log_p + noise, float("-inf"))

        tile_best, tile_token = tl.max(score, 0, return_indices=True)
        chosen = column[:, None] == tile_token[None, :]
        tile_picked = tl.sum(tl.where(chosen, log_p, 0.0), 0)
        better = tile_best > best
        token = tl.where(better, tile_token + tile * BV, token)
        picked = tl.where(better, tile_picked, picked)
        best = tl.maximum(best, tile_best)

        tile_best, tile_token = tl.max(plain, 0, return_indices=True)
        chosen = column[:, None] == tile_token[None, :]
        tile_picked = tl.sum(tl.where(chosen, log_p, 0.0), 0)
        better = tile_best > plain_best
        plain_token = tl.where(better, tile_token + tile * BV, plain_token)
        plain_picked = tl.where(better, tile_picked, plain_picked)
        plain_best = tl.maximum(plain_best, tile_best)
    out = floats + split * 4 * num_rows + safe_rows
    tl.store(out, best, mask=row_inside)
    tl.store(out + num_rows, plain_best, mask=row_inside)
    tl.store(out + 2 * num_rows, picked, mask=row_inside)
    tl.store(out + 3 * num_rows, plain_picked, mask=row_inside)
    out_token = tokens + split * 2 * num_rows + safe_rows
    tl.store(out_token, token.to(tl.int64), mask=row_inside)
    tl.store(out_token + num_rows, plain_token.to(tl.int64), mask=row_inside)


def residual_triton(
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
    """(token, its log p), each [R]; see `residual_torch`."""
    check_triton(hidden, weight, bias, draft_hidden, draft_weight, draft_bias)
    hidden, weight = aligned(hidden), aligned(weight)
    draft_hidden, draft_weight = aligned(draft_hidden), aligned(draft_weight)
    rows, vocab = hidden.shape[0], weight.shape[0]
    config = config_for("residual", hidden)
    row_tiles, splits, per_split = split_grid(rows, vocab, config, hidden.device)
    floats = torch.empty((splits, 2, 2, rows), dtype=torch.float32, device=hidden.device)
    tokens = torch.empty((splits, 2, rows), dtype=torch.int64, device=hidden.device)
    if rows:
        launch(
            residual_kernel,
            (row_tiles, splits),
            (
                hidden,
                weight,
                hidden if bias is None else bias,
                lse,
                draft_hidden,
                draft_weight,
                hidden if draft_bias is None else draft_bias,
                draft_lse,
                rejected.to(torch.int32),
                seed,
                position,
            ),
            (floats, tokens),
            rows,
            vocab,
            hidden.shape[1],
            draft_hidden.shape[1],
            per_split,
            STREAM=STREAM_RESIDUAL,
            **scaling_options(bias, temperature, softcap),
            HAS_DRAFT_BIAS=draft_bias is not None,
            **tile_options(config, hidden, draft_hidden),
        )
    best, picked = (t.flatten(1) for t in floats.unbind(1))  # [splits, 2 R]
    zero = torch.zeros_like(best)
    score, token, value, _, _ = combine_best(best, tokens.flatten(1), picked, zero, zero)
    empty = score[:rows] < NEGATIVE / 2
    picked = torch.where(empty, value[rows:], value[:rows]).clamp_max(0.0)
    # A row of NaN has no best score, and the kernel picks no log p for it.
    picked = torch.where(lse.isnan(), lse, picked)
    return torch.where(empty, token[rows:], token[:rows]), picked
