"""`linear_logprob` as registered operators, so that torch.compile sees one node without breaks.

Rows that are ignored are left out before any work is done and come back as zeros (argmax -1).
"""

import torch
from torch import Tensor

from mtp_kernels.checks import check_ids
from mtp_kernels.linear_logprob.torch import backward_torch, stats_torch
from mtp_kernels.rowstats import RowStats, finish


def row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    impl: str,
) -> RowStats:
    """RowStats [R] by the "torch" or "triton" path; a negative target is in no part."""
    if impl == "triton":
        from mtp_kernels.linear_logprob.triton import stats_triton

        return stats_triton(hidden, weight, bias, target, temperature, softcap)
    return stats_torch(hidden, weight, bias, target, temperature, softcap)


def row_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_values: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    temperature: float,
    softcap: float | None,
    needs: tuple[bool, bool, bool],
    impl: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by hidden, weight, bias; row_values = lse, entropy and the three upstream ones."""
    if impl == "triton":
        from mtp_kernels.linear_logprob.triton import backward_triton

        return backward_triton(
            hidden, weight, bias, target, *row_values, temperature, softcap, needs
        )
    return backward_torch(hidden, weight, bias, target, *row_values, temperature, softcap, needs)


def kept_rows(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """Indices of the rows that are not ignored, or None where that is every row."""
    if ignore_index is None:
        return None
    keep = (target != ignore_index).nonzero()[:, 0]
    return None if keep.numel() == target.numel() else keep


def take(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """The kept rows of a tensor [R, ...]."""
    return tensor if keep is None else tensor.index_select(0, keep)


def put(values: Tensor, keep: Tensor | None, rows: int, fill: int = 0) -> Tensor:
    """The kept rows back in a tensor [rows, ...] that is `fill` elsewhere."""
    if keep is None:
        return values
    full = values.new_full((rows, *values.shape[1:]), fill)
    return full.index_copy_(0, keep, values)


@torch.library.custom_op("mtp_kernels::linear_logprob", mutates_args=())
def logprob_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-prob, log-sum-exp, entropy, argmax), each [R]."""
    keep = kept_rows(target, ignore_index)
    kept = take(target, keep)
    check_ids("target", kept, weight.shape[0], wait=ignore_index is not None)
    stats = row_stats(take(hidden, keep), weight, bias, kept, temperature, softcap, impl)
    logprob, lse, entropy = finish(stats)
    if ignore_index is None:  # what could not be checked must not look like a log-probability
        logprob = torch.where((kept < 0) | (kept >= weight.shape[0]), torch.nan, logprob)
    rows = hidden.shape[0]
    values = (put(value, keep, rows) for value in (logprob, lse, entropy))
    return *values, put(stats.argmax, keep, rows, fill=-1)  # type: ignore[return-value]


@logprob_op.register_fake
def _(hidden, weight, bias, target, temperature, softcap, ignore_index, impl):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    values = [hidden.new_empty(hidden.shape[:1], dtype=dtype) for _ in range(3)]
    return (*values, hidden.new_empty(hidden.shape[:1], dtype=torch.int64))


@torch.library.custom_op("mtp_kernels::linear_logprob_backward", mutates_args=())
def logprob_backward_op(
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
    ignore_index: int | None,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by hidden, weight and bias; an empty tensor for each that is not needed."""
    keep = kept_rows(target, ignore_index)
    row_values = (lse, entropy, grad_logprob, grad_lse, grad_entropy)
    lse, entropy, grad_logprob, grad_lse, grad_entropy = (take(t, keep) for t in row_values)
    grads = row_backward(
        take(hidden, keep),
        weight,
        bias,
        take(target, keep),
        (lse, entropy, grad_logprob, grad_lse, grad_entropy),
        temperature,
        softcap,
        (needs[0], needs[1], needs[2]),
        impl,
    )
    grad_hidden = None if grads[0] is None else put(grads[0], keep, hidden.shape[0])
    return tuple(  # type: ignore[return-value]
        hidden.new_empty(0) if g is None else g for g in (grad_hidden, *grads[1:])
    )


@logprob_backward_op.register_fake
def _(hidden, weight, bias, target, lse, entropy, *rest):  # type: ignore[no-untyped-def]
    needs = rest[-1]
    return tuple(
        t.new_empty(t.shape) if need else hidden.new_empty(0)
        for t, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, *ctx.settings = inputs
    _, lse, entropy, argmax = output
    ctx.mark_non_differentiable(argmax)
    ctx.save_for_backward(hidden, weight, bias, target, lse, entropy)


def _backward(ctx, grad_logprob, grad_lse, grad_entropy, _):  # type: ignore[no-untyped-def]
    needs = [ctx.needs_input_grad[i] for i in range(3)]
    upstream = (
        torch.zeros_like(ctx.saved_tensors[4]) if grad is None else grad
        for grad in (grad_logprob, grad_lse, grad_entropy)
    )
    grads = logprob_backward_op(*ctx.saved_tensors, *upstream, *ctx.settings, needs)
    chosen = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *chosen, None, None, None, None, None


logprob_op.register_autograd(_backward, setup_context=_setup_context)
