"""`linear_loss` in Triton: three matrix products a chunk, gradients made in the forward.

The product kernel writes a chunk's logits in float32 together with the row statistics; the row
gradients follow in closed form; an elementwise kernel turns the logits into their gradient in the
operands' dtype; the two products with it are left to the vendor's library.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_kernels.configs import config_for
from mtp_kernels.dispatch import rows_per_chunk
from mtp_kernels.linear_logprob.triton import stats_triton
from mtp_kernels.linear_loss.objective import row_gradients, row_losses
from mtp_kernels.logits import accumulate_weight
from mtp_kernels.rowstats import finish
from mtp_kernels.tiles import VARYING, launch, scaling_options, unscale_tile


@triton.jit(do_not_specialize=VARYING)
def gradient_from_logits_kernel(
    logits,
    target,
    values,
    out,
    num_rows,
    vocab,
    softcap,
    inverse_temperature,
    HAS_SOFTCAP: tl.constexpr,
    BV: tl.constexpr,
):
    """Out [R, V] by the products, of scaled logits [R, V] and values [3, R]: lse, g_logp, g_lse."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BV + tl.arange(0, BV)
    inside = ids < vocab
    x = tl.load(logits + row * vocab + ids, mask=inside, other=0.0)
    goal = tl.load(target + row)
    lse = tl.load(values + row)
    g_logprob = tl.load(values + num_rows + row)
    g_lse = tl.load(values + 2 * num_rows + row)
    dx = tl.exp(x - lse) * (g_lse - g_logprob)
    dx += tl.where(ids == goal, g_logprob, 0.0)
    dx = unscale_tile(dx, x, softcap, inverse_temperature, HAS_SOFTCAP)
    tl.store(out + row * vocab + ids, dx.to(out.dtype.element_ty), mask=inside)


def loss_triton(
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
    hidden, weight = hidden.contiguous(), weight.contiguous()
    rows, vocab = hidden.shape[0], weight.shape[0]
    outputs = [hidden.new_empty(rows, dtype=torch.float32) for _ in range(4)]
    outputs.append(torch.empty(rows, dtype=torch.int64, device=hidden.device))
    grad_hidden = hidden.new_empty(hidden.shape) if needs[0] else None
    grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if needs[1] else None
    grad_bias = hidden.new_zeros(vocab, dtype=torch.float32) if needs[2] else None
    scaling = (temperature, softcap)
    size = rows_per_chunk(rows, vocab, hidden, tall=needs[1]) if any(needs) else max(rows, 1)
    logits = hidden.new_empty((size, vocab), dtype=torch.float32) if any(needs) else None
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        buffer = None if logits is None else logits[: part.stop - start]
        stats = stats_triton(hidden[part], weight, bias, target[part], *scaling, logits=buffer)
        logprob, lse, entropy = finish(stats)
        objective = (
            None if advantage is None else advantage[part],
            None if old_logprob is None else old_logprob[part],
            clip_low,
            clip_high,
            z_loss,
        )
        losses = row_losses(logprob, lse, *objective) * row_weight[part]
        for out, value in zip(outputs, (losses, logprob, lse, entropy, stats.argmax), strict=True):
            out[part] = value
        if buffer is None:
            continue
        upstream = (g * row_weight[part] for g in row_gradients(logprob, lse, *objective))
        values = torch.stack((lse, *upstream)).float()
        dx = gradient_from_logits(buffer, target[part], values, hidden.dtype, *scaling)
        if grad_hidden is not None:
            torch.mm(dx, weight, out=grad_hidden[part])
        if grad_weight is not None:
            accumulate_weight(grad_weight, dx, hidden[part])
        if grad_bias is not None:
            grad_bias += dx.sum(0, dtype=torch.float32)
    return outputs, [grad_hidden, grad_weight, grad_bias]


def gradient_from_logits(
    logits: Tensor,
    target: Tensor,
    values: Tensor,
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """[R, V] gradient by the products in dtype; in place where that is the logits' own."""
    rows, vocab = logits.shape
    config = config_for("gradient_from_logits", logits)
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    scaling = scaling_options(None, temperature, softcap)
    del scaling["HAS_BIAS"]
    launch(
        gradient_from_logits_kernel,
        (rows, triton.cdiv(vocab, config.vocab)),
        (logits, target, values),
        (out,),
        rows,
        vocab,
        **scaling,
        BV=config.vocab,
        num_warps=config.warps,
    )
    return out
