"""`linear_logprob` tile by tile: any device, no more logits in memory than one tile.

The forward keeps row statistics only; the backward makes a chunk of rows' logits again. A gradient
by the scaled logits x, for upstream gradients g_logp, g_lse, g_H of log-prob, log-sum-exp, entropy:

    dx = g_logp 1[target] + p ((g_lse - g_logp) - g_H (log p + H))
"""

import torch
from torch import Tensor

from mtp_kernels.dispatch import maybe_compiled, rows_per_chunk, statistics_dtype, tile_of
from mtp_kernels.logits import LogitsBuffer, accumulate_weight, scale, unscale
from mtp_kernels.rowstats import NEGATIVE, RowStats, combine


def stats_of_chunk(
    raw: Tensor, bias: Tensor | None, target: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """RowStats, as a tuple, of raw products [R, V]; a negative target is in no part."""
    x = scale(raw, bias, softcap, temperature)
    maximum = x.amax(-1).clamp_min(NEGATIVE)  # a part may forbid all of its ids
    relative = (x - maximum[:, None]).clamp_min(NEGATIVE)
    weight = relative.exp()
    if torch.compiler.is_compiling():
        # The first id that reaches the maximum, in the loop of the sums: argmax has a slow one.
        last = x.shape[1] - 1
        column = torch.arange(last + 1, dtype=torch.int32, device=x.device)
        argmax = torch.where(relative == 0, column, last).amin(-1).long()
    else:
        argmax = x.argmax(-1)
    picked = x.gather(-1, target.clamp_min(0)[:, None])[:, 0]
    return (
        maximum,
        weight.sum(-1),
        (weight * relative).sum(-1),
        torch.where(target >= 0, picked, 0.0),
        argmax,
    )


def gradient_of_chunk(
    raw: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_lse: Tensor,
    grad_entropy: Tensor,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """Turns raw [R, V], the products, into the gradient by them; returns it."""
    x = scale(raw, bias, softcap, temperature)
    log_p = (x - lse[:, None]).clamp_min(NEGATIVE)
    uniform = (grad_lse - grad_logprob) - grad_entropy * entropy
    dx = log_p.exp() * (uniform[:, None] - grad_entropy[:, None] * log_p)
    column = torch.arange(x.shape[1], device=x.device)
    dx = dx + torch.where(column == target[:, None], grad_logprob[:, None], 0.0)
    return raw.copy_(unscale(dx, x, softcap, temperature))


def stats_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
) -> RowStats:
    """RowStats [R] of hidden [R, D] over weight [V, D]; a negative target is in no part."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    height, width = tile_of(rows, vocab, hidden)
    body = maybe_compiled(stats_of_chunk, rows, vocab)
    buffer = LogitsBuffer(hidden, height, width)
    finished = []
    for top in range(0, max(rows, 1), height):
        part = slice(top, min(top + height, rows))
        tiles = []
        for left in range(0, vocab, width):
            ids = slice(left, min(left + width, vocab))
            raw = buffer.product(hidden[part], weight[ids])
            local = target[part] - left
            local = torch.where(local < ids.stop - left, local, -1)
            values = body(raw, None if bias is None else bias[ids], local, temperature, softcap)
            tiles.append((*values[:4], values[4] + left))
        stacked = RowStats(*(torch.stack(field) for field in zip(*tiles, strict=True)))
        finished.append(combine(stacked))
    return RowStats(*(torch.cat(field) for field in zip(*finished, strict=True)))


def backward_torch(
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
    rows, vocab = hidden.shape[0], weight.shape[0]
    dtype = statistics_dtype(hidden)
    grad_hidden = hidden.new_empty(hidden.shape) if needs[0] else None
    grad_weight = weight.new_zeros(weight.shape, dtype=dtype) if needs[1] else None
    grad_bias = hidden.new_zeros(vocab, dtype=dtype) if needs[2] else None
    size = rows_per_chunk(rows, vocab, hidden, tall=needs[1])
    body = maybe_compiled(gradient_of_chunk, rows, vocab)
    buffer = LogitsBuffer(hidden, size, vocab)
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        raw = buffer.product(hidden[part], weight)
        row_tensors = (lse, entropy, grad_logprob, grad_lse, grad_entropy)
        dx = body(raw, bias, target[part], *(t[part] for t in row_tensors), temperature, softcap)
        dx = dx.to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(dx, weight, out=grad_hidden[part])
        if grad_weight is not None:
            accumulate_weight(grad_weight, dx, hidden[part])
        if grad_bias is not None:
            grad_bias += dx.sum(0, dtype=dtype)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )
