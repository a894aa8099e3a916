"""`linear_loss` as a registered operator; its gradients are outputs of the forward."""

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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, log-prob, lse, entropy, argmax, and gradients by hidden, weight, bias or empty)."""
    keep = kept_rows(target, ignore_index)
    rows = hidden.shape[0]
    per_row: tuple[Any, ...] = tuple(
        None if t is None else take(t, keep) for t in (target, row_weight, advantage, old_logprob)
    )
    check_ids("target", per_row[0], weight.shape[0], wait=True)
    settings = (clip_low, clip_high, z_loss, temperature, softcap)
    operands: list[Any] = [take(hidden, keep), weight, bias, *per_row, *settings, needs]
    if impl == "triton":
        from mtp_kernels.linear_loss.triton import loss_triton

        outputs, grads = loss_triton(*operands)
    else:
        outputs, grads = loss_torch(*operands)
    losses, *values, argmax = outputs
    grad_hidden = None if grads[0] is None else put(grads[0], keep, rows)
    casted = [
        hidden.new_empty(0) if g is None or like is None else g.to(like.dtype)
        for g, like in zip((grad_hidden, *grads[1:]), (hidden, weight, bias), strict=True)
    ]
    logprob, lse, entropy = (put(value, keep, rows) for value in values)
    return losses.sum(), logprob, lse, entropy, put(argmax, keep, rows, -1), *casted  # type: ignore[return-value]


@loss_op.register_fake
def _(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    needs = rest[-1]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    values = [hidden.new_empty(hidden.shape[:1], dtype=dtype) for _ in range(3)]
    grads = [
        t.new_empty(t.shape) if need else hidden.new_empty(0)
        for t, need in zip((hidden, weight, bias), needs, strict=True)
    ]
    argmax = hidden.new_empty(hidden.shape[:1], dtype=torch.int64)
    return hidden.new_empty((), dtype=dtype), *values, argmax, *grads


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.needs = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    # Else autograd makes a [V, D] of zeros, as the gradient by the weight's gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[5:])


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    # In place, so that a second [V, D] is never needed; autograd refuses a second backward.
    scale = torch.Tensor.mul if torch.compiler.is_compiling() else torch.Tensor.mul_
    grads = [
        scale(saved, grad.to(saved.dtype)) if need else None
        for saved, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return *grads, *[None] * 12


loss_op.register_autograd(_backward, setup_context=_setup_context)
