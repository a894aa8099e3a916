"""`linear_sample` in Triton: one read of the weight, with the vocabulary as the product's M.

Decoding has few rows and a large vocabulary, so a tile is 128 ids by 16 rows: the tensor cores'
tall side is filled by the weight, which is what has to be read. Each program walks over a part of
the vocabulary and keeps, per row, the best score and the log-sum-exp.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_kernels.configs import config_for, split_grid
from mtp_kernels.noise import STREAM_SAMPLE
from mtp_kernels.rowstats import combine_best
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
def sample_kernel(
    hidden,
    weight,
    bias,
    seed,
    position,
    floats,
    tokens,
    num_rows,
    vocab,
    depth,
    id_start,
    tiles_per_split,
    softcap,
    inverse_temperature,
    GREEDY: tl.constexpr,
    STREAM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    T: tl.constexpr,
):
    """Floats [splits, 4, R] = best score, its logit, m, Z and tokens [splits, R]."""
    BR: tl.constexpr = T.rows
    BV: tl.constexpr = T.vocab
    split = tl.program_id(1).to(tl.int64)
    row_start = tl.program_id(0) * BR
    rows = row_start + tl.arange(0, BR)
    row_inside = rows < num_rows
    safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    key = tl.load(seed + safe_rows)[None, :]
    where = tl.load(position + safe_rows)[None, :]
    best = tl.full((BR,), float("-inf"), tl.float32)
    token = tl.zeros((BR,), tl.int32)
    picked = tl.zeros((BR,), tl.float32)
    m = tl.full((BR,), NEG, tl.float32)
    z = tl.zeros((BR,), tl.float32)
    first = tl.program_id(1) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(vocab, BV))
    for tile in range(first, last):
        ids = tile * BV + tl.arange(0, BV)
        inside = ids < vocab
        x = logits_tile(
            hidden, weight, bias, row_start, tile * BV, num_rows, vocab, depth,
            softcap, inverse_temperature, True, HAS_BIAS, HAS_SOFTCAP, T,
        )  # fmt: skip
        x = tl.where(inside[:, None], x, NEG)
        score = x
        if not GREEDY:
            score = x + gumbel_tile(key, where, STREAM, (id_start + ids)[:, None])
        score = tl.where(inside[:, None], score, float("-inf"))  # below NEG: no id from outside
        tile_best, tile_token = tl.max(score, 0, return_indices=True)
        chosen = tl.arange(0, BV)[:, None] == tile_token[None, :]
        tile_picked = tl.sum(tl.where(chosen, x, 0.0), 0)
        better = tile_best > best
        token = tl.where(better, tile_token + tile * BV, token)
        picked = tl.where(better, tile_picked, picked)
        best = tl.maximum(best, tile_best)
        new_m = tl.maximum(m, tl.max(x, 0))
        z = tl.exp(m - new_m) * z + tl.sum(tl.exp(x - new_m[None, :]), 0)
        m = new_m
    out = floats + split * 4 * num_rows + safe_rows
    tl.store(out, best, mask=row_inside)
    tl.store(out + num_rows, picked, mask=row_inside)
    tl.store(out + 2 * num_rows, m, mask=row_inside)
    tl.store(out + 3 * num_rows, z, mask=row_inside)
    out_token = (token + id_start).to(tl.int64)
    tl.store(tokens + split * num_rows + safe_rows, out_token, mask=row_inside)


def best_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    position: Tensor,
    start: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(best score, its token, its scaled logit, maximum, total), each [R]; see `best_torch`."""
    check_triton(hidden, weight, bias)
    hidden, weight = aligned(hidden), aligned(weight)
    rows, vocab = hidden.shape[0], weight.shape[0]
    config = config_for("sample", hidden)
    row_tiles, splits, per_split = split_grid(rows, vocab, config, hidden.device)
    floats = hidden.new_empty((splits, 4, rows), dtype=torch.float32)
    tokens = torch.empty((splits, rows), dtype=torch.int64, device=hidden.device)
    if rows:
        launch(
            sample_kernel,
            (row_tiles, splits),
            (hidden, weight, hidden if bias is None else bias, seed, position),
            (floats, tokens),
            rows,
            vocab,
            hidden.shape[1],
            start,
            per_split,
            GREEDY=temperature == 0,
            STREAM=STREAM_SAMPLE,
            **scaling_options(bias, temperature or 1.0, softcap),
            **tile_options(config, hidden),
        )
    best, picked, maximum, total = floats.unbind(1)
    return combine_best(best, tokens, picked, maximum, total)
