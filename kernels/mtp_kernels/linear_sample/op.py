"""`linear_sample` as a registered operator, and the dispatch to its paths."""

import torch
from torch import Tensor

from mtp_kernels.linear_sample.torch import best_torch


def best_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    position: Tensor,
    start: int,
    temperature: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(best score, token, its logit, maximum, total) by the "torch" or the "triton" path."""
    operands = (hidden, weight, bias, seed, position, start, temperature, softcap)
    if impl == "triton":
        from mtp_kernels.linear_sample.triton import best_triton

        return best_triton(*operands)
    return best_torch(*operands)


@torch.library.custom_op("mtp_kernels::linear_sample", mutates_args=())
def sample_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    position: Tensor,
    temperature: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(token, log-prob), each [R]."""
    _, token, picked, maximum, total = best_rows(
        hidden, weight, bias, seed, position, 0, temperature, softcap, impl
    )
    return token, ((picked - maximum) - total.log()).clamp_max(0.0)


@sample_op.register_fake
def _(hidden, weight, bias, seed, position, temperature, softcap, impl):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = hidden.shape[:1]
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows, dtype=dtype)
