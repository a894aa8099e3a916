"""Losses of an output layer whose gradients are made in the forward, without its logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from mtp_kernels.checks import check_operands, check_scale
from mtp_kernels.dispatch import autocast_operands, is_direct, resolve_impl, statistics_dtype
from mtp_kernels.linear_loss.op import loss_op
from mtp_kernels.linear_loss.reference import linear_loss_reference
from mtp_kernels.targets import resolve_targets


class LinearLoss(NamedTuple):
    """The loss, and statistics of each row for logs, in hidden's leading shape.

    All but the loss are without gradient; ignored rows hold 0, and -1 in argmax.
    """

    loss: Tensor
    """[] the weighted sum of the row losses."""
    logprob: Tensor
    """Log-probability of the target in nats."""
    lse: Tensor
    """Log-sum-exp of the scaled logits."""
    entropy: Tensor
    """Entropy in nats."""
    argmax: Tensor
    """int64 id of the largest logit."""


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    shift: int = 1,
    document: Tensor | None = None,
    mask: Tensor | None = None,
    advantage: Tensor | None = None,
    old_logprob: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    slot_weight: Tensor | None = None,
    slot_count: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> LinearLoss:
    """Sum over rows of a weight times a row-local loss:

        cross-entropy   -logprob                                      without advantage
        policy          -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A),
                        r = exp(logprob - old_logprob)                 with advantage
        and to each     z_loss * lse ** 2

    Weights are slot_weight[j] / slot_count[j] for slot j of hidden [B, T, K, D] (any other shape is
    a single slot), so each slot is averaged over its own tokens; or row_weight as it is given.

    Args:
        hidden: [..., D] rows, as in `linear_logprob`; so are weight, target, tokens, shift,
            document, mask, temperature, softcap, bias, ignore_index and impl.
        advantage: [...] advantages A; needs old_logprob.
        old_logprob: [...] log-probabilities in nats under the policy that sampled.
        clip_low, clip_high: how far the ratio may fall below and rise above 1 with gradient.
        z_loss: coefficient of lse**2, per nat squared.
        row_weight: [...] weight of each row; excludes slot_weight and slot_count.
        slot_weight: [K] weight of each slot; 1 by default.
        slot_count: [K] tokens to divide each slot by, such as a count over all ranks and
            micro-batches; by default the rows of the slot that are not ignored, at least 1.

    Gradients by hidden, weight and bias are computed in the forward where they are required, and
    only scaled in the backward, in place: no second backward through one loss, and none to the
    weights and advantages.
    """
    hidden, weight, bias = autocast_operands(hidden, weight, bias)  # type: ignore[assignment]
    check_operands(hidden, weight, bias)
    check_scale(temperature, softcap)
    if (advantage is None) != (old_logprob is None):
        raise ValueError("advantage and old_logprob go together; give both or none")
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not bound >= 0:
            raise ValueError(f"{name} must be >= 0, got {bound}")
    lead = hidden.shape[:-1]
    target = resolve_targets(
        hidden,
        target,
        tokens,
        shift=shift,
        document=document,
        mask=mask,
        ignore_index=ignore_index,
    )
    dtype = statistics_dtype(hidden)
    row_weight = _row_weights(target, ignore_index, row_weight, slot_weight, slot_count, dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])
    per_row = [
        None if t is None else _row_shaped(name, t, hidden)
        for name, t in (
            ("row_weight", row_weight),
            ("advantage", advantage),
            ("old_logprob", old_logprob),
        )
    ]
    settings = (float(clip_low), float(clip_high), float(z_loss), float(temperature), softcap)
    operands = (rows, weight, bias, target.reshape(-1), *per_row, *settings, ignore_index)
    impl = resolve_impl(impl, hidden)
    if impl == "reference" or (impl == "torch" and is_direct(rows.shape[0], weight)):
        values = linear_loss_reference(*operands)  # type: ignore[arg-type]
    else:
        needs = [
            torch.is_grad_enabled() and t is not None and t.requires_grad
            for t in (hidden, weight, bias)
        ]
        values = loss_op(*operands, impl, needs)[:5]
    return LinearLoss(values[0], *(value.reshape(lead) for value in values[1:]))


def _row_shaped(name: str, tensor: Tensor, hidden: Tensor) -> Tensor:
    """[R] without gradient, in the dtype of hidden's statistics."""
    lead = hidden.shape[:-1]
    if tensor.shape != lead:
        raise ValueError(
            f"{name} must have hidden's leading shape {tuple(lead)}, got {tuple(tensor.shape)}"
        )
    return tensor.detach().to(statistics_dtype(hidden)).reshape(-1)


def _row_weights(
    target: Tensor,
    ignore_index: int,
    row_weight: Tensor | None,
    slot_weight: Tensor | None,
    slot_count: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Row weights in target's shape; those by slot in `dtype`."""
    if row_weight is not None:
        if slot_weight is not None or slot_count is not None:
            raise ValueError("give row_weight, or slot_weight and slot_count, not both")
        return row_weight
    slots = target.shape[-1] if target.ndim == 3 else 1
    by_slot = target.flatten(0, 1) if target.ndim == 3 else target.reshape(-1, 1)
    if slot_count is None:
        slot_count = (by_slot != ignore_index).sum(0).clamp_min(1)
    weights = torch.ones_like(slot_count) if slot_weight is None else slot_weight
    if weights.shape != (slots,) or slot_count.shape != (slots,):
        raise ValueError(
            f"slot_weight and slot_count must be [K] = [{slots}], got shapes "
            f"{tuple(weights.shape)} and {tuple(slot_count.shape)}"
        )
    return (weights.to(dtype) / slot_count).expand_as(by_slot).reshape(target.shape)
