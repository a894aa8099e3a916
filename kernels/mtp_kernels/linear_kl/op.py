"""`linear_kl` as registered operators, so that torch.compile sees one node without breaks."""

import torch
from torch import Tensor

from mtp_kernels.linear_kl.problem import Layer, Problem
from mtp_kernels.linear_kl.torch import backward_torch, divergence_torch


@torch.library.custom_op("mtp_kernels::linear_kl", mutates_args=())
def kl_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    index: Tensor,
    reverse: bool,
    temperature: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """([R] divergences, [R] the students' log-sum-exp), 0 where index is negative."""
    student = Layer(hidden, weight, bias)
    teacher = Layer(teacher_hidden, teacher_weight, teacher_bias)
    problem = Problem(student, teacher, index, reverse, temperature, softcap)
    if impl == "triton":
        from mtp_kernels.linear_kl.triton import divergence_triton

        return divergence_triton(problem)
    return divergence_torch(problem)


@kl_op.register_fake
def _(hidden, *rest):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    values = [hidden.new_empty(hidden.shape[:1], dtype=dtype) for _ in range(2)]
    return values[0], values[1]


@torch.library.custom_op("mtp_kernels::linear_kl_backward", mutates_args=())
def kl_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    index: Tensor,
    divergence: Tensor,
    lse: Tensor,
    grad: Tensor,
    reverse: bool,
    temperature: float,
    softcap: float | None,
    impl: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients by the first six arguments; an empty tensor for each that is not needed."""
    student = Layer(hidden, weight, bias)
    teacher = Layer(teacher_hidden, teacher_weight, teacher_bias)
    problem = Problem(student, teacher, index, reverse, temperature, softcap)
    if impl == "triton":
        from mtp_kernels.linear_kl.triton import backward_triton

        grads = backward_triton(problem, divergence, lse, grad, needs)
    else:
        grads = backward_torch(problem, divergence, lse, grad, needs)
    return [hidden.new_empty(0) if g is None else g for g in grads]


@kl_backward_op.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    hidden, needs = args[0], args[-1]
    return [
        t.new_empty(t.shape) if need else hidden.new_empty(0)
        for t, need in zip(args[:6], needs, strict=True)
    ]


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *operands, ctx.reverse, ctx.temperature, ctx.softcap, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*operands, *output)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    needs = [ctx.needs_input_grad[i] for i in range(6)]
    settings = (ctx.reverse, ctx.temperature, ctx.softcap, ctx.impl)
    grads = kl_backward_op(*ctx.saved_tensors, grad, *settings, needs)
    chosen = (g if need else None for g, need in zip(grads, needs, strict=True))
    return *chosen, None, None, None, None, None


kl_op.register_autograd(_backward, setup_context=_setup_context)
