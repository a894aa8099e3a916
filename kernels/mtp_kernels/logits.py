"""Scaled logits and their derivative, for one chunk of rows: shared by the PyTorch paths.

    x = softcap * tanh((h W^T + b) / softcap) / temperature

The matrix product is taken in the operands' own dtype where PyTorch has no mixed-precision product
(bfloat16 on a CPU); everything after it is in the statistics' dtype.
"""

import torch
from torch import Tensor

from mtp_kernels.dispatch import statistics_dtype


def product(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """[R, V] hidden [R, D] times weight [V, D] transposed; float32 on a GPU for 16-bit operands."""
    if hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return torch.mm(hidden, weight.T, out=out)


def scale(raw: Tensor, bias: Tensor | None, softcap: float | None, temperature: float) -> Tensor:
    """Raw products [R, V] as scaled logits in the statistics' dtype."""
    x = raw.to(statistics_dtype(raw))
    if bias is not None:
        x = x + bias
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x if temperature == 1.0 else x / temperature


def unscale(gradient: Tensor, x: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """The gradient by the raw products (and the bias) of a gradient by the scaled logits x."""
    if softcap is not None:
        ratio = x * (temperature / softcap)
        gradient = gradient * (1.0 - ratio * ratio)
    return gradient if temperature == 1.0 else gradient / temperature


def accumulate_weight(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Adds gradient [R, V] transposed times hidden [R, D] to total [V, D], never 16-bit."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, hidden)
    elif gradient.is_cuda:
        total.add_(torch.mm(gradient.T, hidden, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(gradient.T, hidden))
