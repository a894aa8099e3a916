"""Choice of the implementation, and of the size of its pieces.

Every op takes `impl="auto" | "reference" | "torch" | "triton"`. This module resolves "auto",
decides whether chunk bodies may be compiled, and how many rows are processed at once. It is
independent of any particular op.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IMPLS = ("auto", "reference", "torch", "triton")

DIRECT_NUMEL = 1 << 23
"""Problems of at most this many logits, in float32 or float64, run as plain PyTorch."""
COMPILE_NUMEL = 1 << 25
"""Chunk bodies are compiled from this many logits on; below, compiling costs more than it saves."""
DIRECT_NUMEL_SAMPLE = 1 << 18
COMPILE_NUMEL_SAMPLE = 1 << 21
"""The same two for sampling, which is called often and whose noise is slow uncompiled."""
CHUNK_BYTES = 24 << 20
"""Working memory for one chunk of logits, in bytes, on a CPU."""
TILE_ROWS = 1024
"""Rows of a tile where the vocabulary is cut as well."""
ALIGNMENT = 64
"""Rows and vocabulary ids of a tile are multiples of this: odd sizes slow the product down."""
CHUNK_BYTES_TALL = 48 << 20
"""The same where each chunk costs a pass over [V, D], to read it or to add to its gradient."""
CHUNK_BYTES_DEVICE = 512 << 20
"""The same on an accelerator, where a chunk must fill the whole device."""
CHUNK_BYTES_DEVICE_TALL = 4 << 30
"""The most there for tall chunks: kernels count a chunk's logits in 32 bits."""


TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
"""True where the triton package can be imported."""


def triton_interpreted() -> bool:
    """True where Triton kernels run in Triton's interpreter, so on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def compiler_found() -> bool:
    """True where TorchInductor would find a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "c++"))


def resolve_impl(impl: str, tensor: Tensor) -> str:
    """The implementation to run on `tensor`'s device: "reference", "torch" or "triton".

    "auto" is "triton" for CUDA and ROCm tensors where Triton is installed, and "torch" elsewhere.
    Asking for "triton" where it cannot run is an error, never a silent fallback.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    if impl == "auto":
        return "triton" if tensor.is_cuda and TRITON_INSTALLED else "torch"
    if impl == "triton":
        if not TRITON_INSTALLED:
            raise ValueError(
                "impl='triton' needs the triton package; install it or use impl='torch'"
            )
        if not tensor.is_cuda and not triton_interpreted():
            raise ValueError(
                f"impl='triton' needs CUDA tensors, got {tensor.device}; use impl='torch', or set "
                "TRITON_INTERPRET=1 before the first import of triton"
            )
    return impl


def is_direct(rows: int, weight: Tensor, sampling: bool = False) -> bool:
    """True where a problem is so small that plain PyTorch on all its logits is the best path.

    Never for 16-bit operands: their products are rounded alike whatever the size.
    """
    limit = min(DIRECT_NUMEL, DIRECT_NUMEL_SAMPLE) if sampling else DIRECT_NUMEL
    wide = weight.dtype in (torch.float32, torch.float64)
    return wide and rows * weight.shape[0] <= limit


def rows_per_chunk(
    rows: int, vocab: int, operand: Tensor, buffers: int = 1, tall: bool = False
) -> int:
    """Rows whose logits, in `buffers` copies of their dtype, fit the working memory; at least 16.

    The rows are split evenly, so that no small remainder is left over.
    """
    budget = CHUNK_BYTES_TALL if tall else CHUNK_BYTES
    width = operand.itemsize
    if operand.device.type != "cpu":
        budget, width = CHUNK_BYTES_DEVICE, 4  # products are float32 there
        if tall:  # no more than the gradient of [V, D] itself, which every chunk is added to
            gradient = width * vocab * operand.shape[-1]
            budget = max(budget, min(gradient, CHUNK_BYTES_DEVICE_TALL))
    return _even(rows, max(16, budget // (width * vocab * buffers)))


def tile_of(rows: int, vocab: int, operand: Tensor) -> tuple[int, int]:
    """(rows, vocabulary ids) of a tile of logits within the working memory.

    Tall tiles read the weight less often, and keep the product efficient.
    """
    budget = CHUNK_BYTES if operand.device.type == "cpu" else CHUNK_BYTES_DEVICE
    height = _even(rows, TILE_ROWS)
    return height, _even(vocab, max(16, budget // (4 * height)))


def _even(total: int, most: int) -> int:
    """The size of the fewest equal pieces of at most `most`, a multiple of ALIGNMENT if it fits."""
    pieces = max(1, -(-total // most))
    size = max(1, -(-total // pieces))
    aligned = -(-size // ALIGNMENT) * ALIGNMENT
    return min(aligned, total) if pieces > 1 and aligned <= most else size


def maybe_compiled(
    body: Callable[..., Any], rows: int, vocab: int, sampling: bool = False
) -> Callable[..., Any]:
    """`body`, compiled where the problem is large enough and a compiler is there."""
    threshold = COMPILE_NUMEL_SAMPLE if sampling else COMPILE_NUMEL
    if rows * vocab < threshold or not compiler_found():
        return body
    return _compiled(body)


@functools.cache
def _compiled(body: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(body, dynamic=None)

    def call(*arguments: Any) -> Any:
        # Detached: dynamo reads .grad of its inputs, which warns for non-leaf tensors.
        return compiled(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))

    return call


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of row statistics: float64 for float64 operands, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def autocast_operands(*operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands in the dtype that torch.autocast asks for, or unchanged outside of it."""
    device = next(t for t in operands if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in operands)
