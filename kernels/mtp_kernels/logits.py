"""Scaled logits and their derivative, for one chunk of rows: shared by the PyTorch paths.

    x = softcap * tanh((h W^T + b) / softcap) / temperature

The matrix product is taken in the operands' own dtype where PyTorch has no mixed-precision product
(bfloat16 on a CPU); everything after it is in the statistics' dtype.
"""

import torch
from torch import Tensor

from mtp_kernels.dispatch import statistics_dtype

BLOCK_NUMEL = 1 << 20
"""Elements of a weight gradient that are accumulated at once."""


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """[R, V] hidden [R, D] times weight [V, D] transposed; float32 on a GPU for 16-bit operands."""
    if hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return torch.mm(hidden, weight.T)


class LogitsBuffer:
    """Memory for one chunk of products at a time: fresh memory would be paged in every time."""

    def __init__(self, hidden: Tensor, rows: int, vocab: int) -> None:
        self.memory = hidden.new_empty(0 if hidden.is_cuda else rows * vocab)

    def product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The result of the function `product`, valid until the next call."""
        if hidden.is_cuda:
            return product(hidden, weight)
        shape = (hidden.shape[0], weight.shape[0])
        out = self.memory[: shape[0] * shape[1]].view(shape)
        return torch.mm(hidden, weight.T, out=out)


def scale(raw: Tensor, bias: Tensor | None, softcap: float | None, temperature: float) -> Tensor:
    """Raw products [R, V] as scaled logits in the statistics' dtype."""
    x = raw.to(statistics_dtype(raw))
    if bias is not None:
        x = x + bias.to(x.dtype)
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
        product = torch.ops.aten.addmm.dtype_out  # torch.addmm has no out_dtype in every version
        product(total, gradient.T, hidden, total.dtype, out=total)
    else:
        # In blocks that stay in the cache: a 16-bit [V, D] between would be written and read again.
        if hidden.dtype == torch.float16:
            hidden = hidden.float()  # a block's sum over rows may be too large for float16
        block = max(16, BLOCK_NUMEL // hidden.shape[1])
        for start in range(0, total.shape[0], block):
            ids = slice(start, start + block)
            with torch.autocast("cpu", enabled=False):  # else float16 again
                total[ids] += torch.mm(gradient[:, ids].T.to(hidden.dtype), hidden)
