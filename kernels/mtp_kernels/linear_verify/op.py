"""Residual sampling of `linear_verify` as a registered operator."""

from typing import Any

import torch
from torch import Tensor

from mtp_kernels.dispatch import resolve_impl, statistics_dtype
from mtp_kernels.linear_verify.torch import residual_torch


@torch.library.custom_op("mtp_kernels::linear_verify_residual", mutates_args=())
def residual_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    draft_hidden: Tensor,
    draft_weight: Tensor,
    draft_bias: Tensor | None,
    draft_lse: Tensor,
    rejected: Tensor,
    seed: Tensor,
    position: Tensor,
    temperature: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(token, its log p), each [R], by the path that impl names.

    "reference" is the "torch" path with operands in the statistics' dtype, as those of its lse.
    """
    main: tuple[Any, ...] = (hidden, weight, bias, lse)
    draft: tuple[Any, ...] = (draft_hidden, draft_weight, draft_bias, draft_lse)
    rest: tuple[Any, ...] = (rejected, seed, position, temperature, softcap)
    if resolve_impl(impl, hidden) == "triton":
        from mtp_kernels.linear_verify.triton import residual_triton

        return residual_triton(*main, *draft, *rest)
    if impl == "reference":
        dtype = statistics_dtype(hidden)
        main = (hidden.to(dtype), weight.to(dtype), bias, lse)
        draft = (draft_hidden.to(dtype), draft_weight.to(dtype), draft_bias, draft_lse)
    with torch.autocast(hidden.device.type, enabled=False):
        return residual_torch(*main, *draft, *rest)


@residual_rows.register_fake
def _(hidden, weight, bias, lse, *rest):  # type: ignore[no-untyped-def]
    return lse.new_empty(lse.shape, dtype=torch.int64), lse.new_empty(lse.shape)
