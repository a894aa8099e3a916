"""`linear_loss` as a registered operator; its gradients are outputs of the forward.

The forward does not know the upstream gradient, a loss scale included, so weights of 1 / tokens
would make gradients too small for float16. It computes them for weights divided by a factor that
leaves the largest below 1, and the backward multiplies by both numbers.
"""

from typing import Any

import torch
from torch import Tensor

from mtp_kernels.checks import check_ids
from mtp_kernels.linear_logprob.op import kept_rows, put, take
from mtp_kernels.linear_loss.torch import loss_torch


@torch.library.custom_op("mtp_kernels::linear_loss", mutates_args=())
def loss_op(
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
    ignore_index: int,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, log-prob, lse, entropy, argmax, gradients by hidden, weight, bias, their factor).

    Gradients that are not needed are empty. Those by weight and bias are in `kept_dtype`.
    """
    keep = kept_rows(target, ignore_index)
    rows = hidden.shape[0]
    per_row: tuple[Any, ...] = tuple(
        None if t is None else take(t, keep) for t in (target, row_weight, advantage, old_logprob)
    )
    target, row_weight, *policy = per_row
    check_ids("target", target, weight.shape[0], wait=True)
    factor = _power_of_two_above(row_weight)
    per_row = (target, row_weight / factor, *policy)
    settings = (clip_low, clip_high, z_loss, temperature, softcap)
    operands: list[Any] = [take(hidden, keep), weight, bias, *per_row, *settings, needs]
    if impl == "triton":
        from mtp_kernels.linear_loss.triton import loss_triton

        row_outputs, grads = loss_triton(*operands)
    else:
        row_outputs, grads = loss_torch(*operands)
    losses, *values, argmax = row_outputs
    casted = [
        hidden.new_empty(0) if g is None or like is None else g.to(kept_dtype(like))
        for g, like in zip(grads[1:], (weight, bias), strict=True)
    ]
    grad_hidden = hidden.new_empty(0) if grads[0] is None else put(grads[0], keep, rows)
    logprob, lse, entropy = (put(value, keep, rows) for value in values)
    outputs = (losses.sum() * factor, logprob, lse, entropy, put(argmax, keep, rows, -1))
    return *outputs, grad_hidden, *casted, factor  # type: ignore[return-value]


def kept_dtype(operand: Tensor) -> torch.dtype:
    """The dtype of the weight's or the bias's gradient from the forward to the backward.

    float16 overflows there: before the backward multiplies it, it is a sum over rows of weight 1.
    """
    return torch.float32 if operand.dtype == torch.float16 else operand.dtype


def _power_of_two_above(row_weight: Tensor) -> Tensor:
    """[] a power of two above the largest absolute weight [R]: dividing by it rounds nothing."""
    if row_weight.numel() == 0:
        return row_weight.new_ones(())
    largest = row_weight.abs().amax().clamp_min(torch.finfo(row_weight.dtype).tiny)
    return largest / largest.frexp().mantissa


@loss_op.register_fake
def _(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    needs = rest[-1]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    values = [hidden.new_empty(hidden.shape[:1], dtype=dtype) for _ in range(3)]
    dtypes = (hidden.dtype, *(None if t is None else kept_dtype(t) for t in (weight, bias)))
    grads = [
        t.new_empty(t.shape, dtype=kept) if need else hidden.new_empty(0)
        for t, kept, need in zip((hidden, weight, bias), dtypes, needs, strict=True)
    ]
    argmax = hidden.new_empty(hidden.shape[:1], dtype=torch.int64)
    loss, factor = (hidden.new_empty((), dtype=dtype) for _ in range(2))
    return loss, *values, argmax, *grads, factor


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.needs = inputs[-1]
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])
    # Else autograd makes a [V, D] of zeros, as the gradient by the weight's gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[5:])


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    *saved, factor = ctx.saved_tensors
    grads = [
        _multiplied(t, grad * factor).to(dtype) if need else None
        for t, dtype, need in zip(saved, ctx.dtypes, ctx.needs, strict=True)
    ]
    return *grads, *[None] * 12


def _multiplied(saved: Tensor, factor: Tensor) -> Tensor:
    """Saved times factor [] in the factor's dtype, in place: a second [V, D] is never needed.

    Autograd refuses a second backward for that. A GPU and compiled code may round a factor of shape
    [] to saved's dtype before the product. They do not with shape [1], where a CPU would make a
    copy in the factor's dtype.
    """
    if torch.compiler.is_compiling():
        return saved * factor[None]
    return saved.mul_(factor if saved.device.type == "cpu" else factor[None])


loss_op.register_autograd(_backward, setup_context=_setup_context)
