"""Checks that all implementations of an op share: shapes, dtypes and ranges of its arguments."""

import math

import torch
from torch import Tensor


def check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless hidden [..., D], weight [V, D] and bias [V] fit together."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be [V, D] and not empty, got shape {tuple(weight.shape)}")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [..., D] with D = {weight.shape[1]} as in weight, "
            f"got shape {tuple(hidden.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight must share one dtype, got {hidden.dtype} and {weight.dtype}; "
            "cast one of them, or call under torch.autocast"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    for name, tensor in (("hidden", hidden), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}; cast it")


def check_scale(temperature: float, softcap: float | None, greedy: bool = False) -> None:
    """Raises ValueError unless temperature and softcap are finite and positive.

    greedy: whether temperature 0, for the largest logit, is allowed.
    """
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if isinstance(value, Tensor):
            raise ValueError(f"{name} must be a number, got a tensor; use .item()")
    if not (0 < temperature < math.inf or (greedy and temperature == 0)):
        least = ">= 0" if greedy else "> 0"
        raise ValueError(f"temperature must be {least} and finite, got {temperature}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be > 0 and finite, or None, got {softcap}")


def check_integers(**tensors: object) -> None:
    """Raises ValueError for a named tensor that does not hold integers; others pass."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and (
            tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex()
        ):
            raise ValueError(f"{name} must hold integers, got {tensor.dtype}; use .long()")


def check_document_and_mask(
    document: Tensor | None, mask: Tensor | None, shape: tuple[int, int]
) -> None:
    """Raises ValueError unless document is integer [B, T] and mask bool [B, T], where given."""
    check_integers(document=document)
    for name, tensor in (("document", document), ("mask", mask)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must be [B, T] = {list(shape)}, got shape {tuple(tensor.shape)}"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}; use mask != 0")


def check_ids(name: str, ids: Tensor, vocab: int, wait: bool = False) -> None:
    """Raises ValueError for an id outside of [0, vocab).

    wait: whether an accelerator is waited for; without it nothing is checked there.
    """
    if torch.compiler.is_compiling() or not (wait or ids.device.type == "cpu"):
        return
    wrong = (ids < 0) | (ids >= vocab)
    if wrong.any():
        first = int(ids[wrong][0])
        raise ValueError(
            f"{name} must be in [0, {vocab}), or ignore_index where there is none, got {first}"
        )
