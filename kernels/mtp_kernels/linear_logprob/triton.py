"""`linear_logprob` in Triton: row statistics in one pass, and the gradient by the logits.

Forward: a program owns a tile of rows and a part of the vocabulary, and keeps running statistics
(see `mtp_kernels.rowstats`) while it walks over vocabulary tiles; the parts are combined in order,
so that the result is the same in every run. Backward: a chunk of rows at a time, each logits tile
is made again, turned into its gradient and written in the operands' dtype; the two products with it
are left to the vendor's library, the weight's accumulated in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_kernels.configs import config_for, split_grid
from mtp_kernels.dispatch import rows_per_chunk
from mtp_kernels.logits import accumulate_weight
from mtp_kernels.rowstats import RowStats, combine
from mtp_kernels.tiles import (
    NEG,
    VARYING,
    aligned,
    check_triton,
    launch,
    logits_tile,
    operand_arguments,
    scaling_options,
    tile_options,
    unscale_tile,
)


@triton.jit(do_not_specialize=VARYING)
def row_stats_kernel(
    hidden,
    weight,
    bias,
    target,
    floats,
    argmax,
    logits,
    num_rows,
    vocab,
    depth,
    tiles_per_split,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    T: tl.constexpr,
):
    """Floats [splits, 4, R] = m, Z, X, y and argmax [splits, R]; logits [R, V] where STORE."""
    BR: tl.constexpr = T.rows
    BV: tl.constexpr = T.vocab
    split = tl.program_id(1).to(tl.int64)
    row_start = tl.program_id(0) * BR
    rows = row_start + tl.arange(0, BR)
    row_inside = rows < num_rows
    safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    goal = tl.load(target + safe_rows)
    m = tl.full((BR,), NEG, tl.float32)
    z = tl.zeros((BR,), tl.float32)
    x_moment = tl.zeros((BR,), tl.float32)
    y = tl.zeros((BR,), tl.float32)
    best = tl.zeros((BR,), tl.int32)
    first = tl.program_id(1) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(vocab, BV))
    for tile in tl.range(first, last, flatten=T.described):
        ids = tile * BV + tl.arange(0, BV)
        inside = ids < vocab
        x = logits_tile(
            hidden, weight, bias, row_start, tile * BV, num_rows, vocab, depth,
            softcap, inverse_temperature, False, HAS_BIAS, HAS_SOFTCAP, T,
        )  # fmt: skip
        if STORE:
            place = safe_rows[:, None] * vocab + ids[None, :]
            tl.store(logits + place, x, mask=row_inside[:, None] & inside[None, :])
        x = tl.where(inside[None, :], x, NEG)
        tile_max, tile_best = tl.max(x, 1, return_indices=True)
        best = tl.where(tile_max > m, tile_best + tile * BV, best)
        new_m = tl.maximum(m, tile_max)
        change = m - new_m
        fade = tl.exp(change)
        relative = x - new_m[:, None]
        e = tl.exp(relative)
        x_moment = fade * (x_moment + change * z) + tl.sum(e * relative, 1)
        z = fade * z + tl.sum(e, 1)
        y += tl.sum(tl.where(ids[None, :] == goal[:, None], x, 0.0), 1)
        m = new_m
    out = floats + split * 4 * num_rows + safe_rows
    tl.store(out, m, mask=row_inside)
    tl.store(out + num_rows, z, mask=row_inside)
    tl.store(out + 2 * num_rows, x_moment, mask=row_inside)
    tl.store(out + 3 * num_rows, y, mask=row_inside)
    tl.store(argmax + split * num_rows + safe_rows, best.to(tl.int64), mask=row_inside)


@triton.jit(do_not_specialize=VARYING)
def row_gradient_kernel(
    hidden,
    weight,
    bias,
    target,
    values,
    out,
    num_rows,
    vocab,
    depth,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    T: tl.constexpr,
):
    """Out [R, V] by the products, of values [5, R] = lse, H, g_logp, g_lse, g_H."""
    BR: tl.constexpr = T.rows
    BV: tl.constexpr = T.vocab
    row_start = tl.program_id(0) * BR
    rows = row_start + tl.arange(0, BR)
    safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    id_start = tl.program_id(1) * BV
    ids = id_start + tl.arange(0, BV)
    x = logits_tile(
        hidden, weight, bias, row_start, id_start, num_rows, vocab, depth,
        softcap, inverse_temperature, False, HAS_BIAS, HAS_SOFTCAP, T,
    )  # fmt: skip
    goal = tl.load(target + safe_rows)
    lse = tl.load(values + safe_rows)
    entropy = tl.load(values + num_rows + safe_rows)
    g_logprob = tl.load(values + 2 * num_rows + safe_rows)
    g_lse = tl.load(values + 3 * num_rows + safe_rows)
    g_entropy = tl.load(values + 4 * num_rows + safe_rows)
    log_p = x - lse[:, None]
    uniform = (g_lse - g_logprob) - g_entropy * entropy
    dx = tl.exp(log_p) * (uniform[:, None] - g_entropy[:, None] * log_p)
    dx += tl.where(ids[None, :] == goal[:, None], g_logprob[:, None], 0.0)
    dx = unscale_tile(dx, x, softcap, inverse_temperature, HAS_SOFTCAP)
    inside = (rows < num_rows)[:, None] & (ids < vocab)[None, :]
    place = safe_rows[:, None] * vocab + ids[None, :]
    tl.store(out + place, dx.to(out.dtype.element_ty), mask=inside)


def stats_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    logits: Tensor | None = None,
) -> RowStats:
    """RowStats [R]; a negative target is in no part. Float32 logits [R, V] take scaled logits."""
    check_triton(hidden, weight, bias)
    hidden, weight = aligned(hidden), aligned(weight)
    rows, vocab = hidden.shape[0], weight.shape[0]
    config = config_for("row_stats" if logits is None else "row_stats_store", hidden, weight)
    row_tiles, splits, per_split = split_grid(rows, vocab, config, hidden.device)
    floats = hidden.new_empty((splits, 4, rows), dtype=torch.float32)
    argmax = torch.empty((splits, rows), dtype=torch.int64, device=hidden.device)
    if rows:
        launch(
            row_stats_kernel,
            (row_tiles, splits),
            (*operand_arguments(config, hidden, weight), hidden if bias is None else bias, target),
            (floats, argmax, floats if logits is None else logits),
            rows,
            vocab,
            hidden.shape[1],
            per_split,
            **scaling_options(bias, temperature, softcap),
            STORE=logits is not None,
            **tile_options(config, hidden),
        )
    maximum, total, moment, picked = floats.unbind(1)
    return combine(RowStats(maximum, total, moment, picked, argmax))


def backward_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_lse: Tensor,
    grad_entropy: Tensor,
    temperature: float,
    softcap: float | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by hidden, weight and bias, each None unless `needs` asks for it."""
    check_triton(hidden, weight, bias)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    factors = aligned(hidden), aligned(weight)
    rows, vocab = hidden.shape[0], weight.shape[0]
    config = config_for("row_gradient", *factors, has_softcap=softcap is not None)
    grad_hidden = hidden.new_empty(hidden.shape) if needs[0] else None
    grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if needs[1] else None
    grad_bias = hidden.new_zeros(vocab, dtype=torch.float32) if needs[2] else None
    values = torch.stack((lse, entropy, grad_logprob, grad_lse, grad_entropy)).float()
    size = rows_per_chunk(rows, vocab, hidden, tall=needs[1])
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        count = part.stop - start
        dx = hidden.new_empty((count, vocab))
        launch(
            row_gradient_kernel,
            (triton.cdiv(count, config.rows), triton.cdiv(vocab, config.vocab)),
            (
                *operand_arguments(config, factors[0][part], factors[1]),
                hidden if bias is None else bias,
                target[part],
                values[:, part],
            ),
            (dx,),
            count,
            vocab,
            factors[0].shape[1],
            **scaling_options(bias, temperature, softcap),
            **tile_options(config, factors[0]),
        )
        if grad_hidden is not None:
            torch.mm(dx, weight, out=grad_hidden[part])
        if grad_weight is not None:
            accumulate_weight(grad_weight, dx, hidden[part])
        if grad_bias is not None:
            grad_bias += dx.sum(0, dtype=torch.float32)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )
