"""`linear_loss` in chunks of rows, with gradients computed in the forward: three matrix products.

The upstream gradient of a row-local loss is known once the row's statistics are, so a chunk's
logits are turned into their gradient in place and never recomputed.
"""

import torch
from torch import Tensor

from mtp_kernels.dispatch import maybe_compiled, rows_per_chunk, statistics_dtype
from mtp_kernels.linear_logprob.torch import stats_of_chunk
from mtp_kernels.linear_loss.objective import row_gradients, row_losses
from mtp_kernels.logits import LogitsBuffer, accumulate_weight, scale, unscale
from mtp_kernels.rowstats import NEGATIVE, RowStats, finish


def loss_of_chunk(
    raw: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    advantage: Tensor | None,
    old_logprob: Tensor | None,
    clip_low: float,
    clip_high: float,
    z_loss: float,
    temperature: float,
    softcap: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(weighted losses, log-prob, lse, entropy, argmax) [R]; raw [R, V] becomes its gradient."""
    stats = RowStats(*stats_of_chunk(raw, bias, target, temperature, softcap))
    logprob, lse, entropy = finish(stats)
    objective = (advantage, old_logprob, clip_low, clip_high, z_loss)
    losses = row_losses(logprob, lse, *objective) * row_weight
    if with_gradient:
        grad_logprob, grad_lse = row_gradients(logprob, lse, *objective)
        grad_logprob = (grad_logprob * row_weight)[:, None]
        x = scale(raw, bias, softcap, temperature)
        dx = (x - lse[:, None]).clamp_min(NEGATIVE).exp()
        dx = dx * ((grad_lse * row_weight)[:, None] - grad_logprob)
        column = torch.arange(x.shape[1], device=x.device)
        dx = dx + torch.where(column == target[:, None], grad_logprob, 0.0)
        raw.copy_(unscale(dx, x, softcap, temperature))
    return losses, logprob, lse, entropy, stats.argmax


def loss_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    advantage: Tensor | None,
    old_logprob: Tensor | None,
    clip_low: float,
    clip_high: float,
    z_loss: float,
    temperature: float,
    softcap: float | None,
    needs: list[bool],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """([weighted losses, log-prob, lse, entropy, argmax] each [R], gradients as in `needs`)."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    dtype = statistics_dtype(hidden)
    outputs = [hidden.new_empty(rows, dtype=dtype) for _ in range(4)]
    outputs.append(torch.empty(rows, dtype=torch.int64, device=hidden.device))
    grad_hidden = hidden.new_empty(hidden.shape) if needs[0] else None
    grad_weight = weight.new_zeros(weight.shape, dtype=dtype) if needs[1] else None
    grad_bias = hidden.new_zeros(vocab, dtype=dtype) if needs[2] else None
    # A chunk's weight gradient reads and writes all of [V, D], so training wants taller chunks.
    size = rows_per_chunk(rows, vocab, hidden, tall=any(needs))
    body = maybe_compiled(loss_of_chunk, rows, vocab)
    buffer = LogitsBuffer(hidden, size, vocab)
    settings = (clip_low, clip_high, z_loss, temperature, softcap, any(needs))
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        raw = buffer.product(hidden[part], weight)
        per_row = (
            target[part],
            row_weight[part],
            *(None if t is None else t[part] for t in (advantage, old_logprob)),
        )
        for out, value in zip(outputs, body(raw, bias, *per_row, *settings), strict=True):
            out[part] = value
        dx = raw.to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(dx, weight, out=grad_hidden[part])
        if grad_weight is not None:
            accumulate_weight(grad_weight, dx, hidden[part])
        if grad_bias is not None:
            grad_bias += dx.sum(0, dtype=dtype)
    return outputs, [grad_hidden, grad_weight, grad_bias]
