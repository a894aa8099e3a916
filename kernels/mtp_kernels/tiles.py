"""Code that the Triton kernels share: the product tile, the logits' scaling and the noise.

The interpreter computes bfloat16 products wrongly, so tiles are upcast there.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mtp_kernels.configs import ALIGNMENT, Config
from mtp_kernels.dispatch import triton_interpreted
from mtp_kernels.noise import (
    LARGEST,
    MULTIPLIER_0,
    MULTIPLIER_1,
    ROUNDS,
    WEYL_0,
    WEYL_1,
)
from mtp_kernels.rowstats import NEGATIVE

NEG = tl.constexpr(NEGATIVE)
_ROUNDS = tl.constexpr(ROUNDS)
_M0 = tl.constexpr(MULTIPLIER_0)
_M1 = tl.constexpr(MULTIPLIER_1)
_W0 = tl.constexpr(WEYL_0)
_W1 = tl.constexpr(WEYL_1)
_LARGEST = tl.constexpr(LARGEST)

VARYING = ["num_rows", "tiles_per_split", "id_start"]
"""Arguments that differ from call to call: no kernel is compiled anew for what divides them."""


class Tile(NamedTuple):
    """Compile-time parameters of a kernel: the sizes of its tiles and its products."""

    rows: int
    """Rows of hidden states."""
    vocab: int
    """Vocabulary ids."""
    depth: int
    """Elements of D per step of the product."""
    even: bool
    """True where D is whole steps."""
    precision: str
    """Triton's input_precision for products of float32 operands."""
    upcast: bool
    """True where operands are made float32 first."""
    described: bool
    """True where operands come as tensor descriptors, which bulk copies (TMA) read."""


@triton.jit
def product_tile(
    a, b, a_start, b_start, a_count, b_count, depth,
    BA: tl.constexpr, BB: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """[BA, BB] float32 rows from a_start on of a [a_count, depth] times those of b, transposed.

    Rows after the last one are 0 where operands are described, and else the last one's.
    """
    total = tl.zeros((BA, BB), dtype=tl.float32)
    if T.described:
        for start in range(0, depth, T.depth):
            left = a.load([a_start, start])
            right = b.load([b_start, start])
            if T.upcast:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            total = tl.dot(left, right.T, total, input_precision=T.precision)
    else:
        k = tl.arange(0, T.depth)
        a_rows = tl.minimum(a_start + tl.arange(0, BA), a_count - 1).to(tl.int64)
        b_rows = tl.minimum(b_start + tl.arange(0, BB), b_count - 1).to(tl.int64)
        a_tile = a + a_rows[:, None] * depth + k[None, :]
        b_tile = b + b_rows[None, :] * depth + k[:, None]
        for start in range(0, depth, T.depth):
            if T.even:
                left = tl.load(a_tile)
                right = tl.load(b_tile)
            else:
                inside = k < depth - start
                left = tl.load(a_tile, mask=inside[None, :], other=0.0)
                right = tl.load(b_tile, mask=inside[:, None], other=0.0)
            if T.upcast:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision=T.precision)
            a_tile += T.depth
            b_tile += T.depth
    return total


@triton.jit
def logits_tile(
    hidden,
    weight,
    bias,
    row_start,
    id_start,
    num_rows,
    vocab,
    depth,
    softcap,
    inverse_temperature,
    VOCAB_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    T: tl.constexpr,
):
    """Scaled logits of a tile, NaN or finite: [rows, ids], or [ids, rows] where VOCAB_FIRST.

    Values after the last row or id are those of other ones, and the caller must mask them.
    """
    if VOCAB_FIRST:
        x = product_tile(
            weight, hidden, id_start, row_start, vocab, num_rows, depth, T.vocab, T.rows, T
        )
    else:
        x = product_tile(
            hidden, weight, row_start, id_start, num_rows, vocab, depth, T.rows, T.vocab, T
        )
    offset = 0.0
    if HAS_BIAS:
        ids = tl.minimum(id_start + tl.arange(0, T.vocab), vocab - 1)
        offset = tl.load(bias + ids).to(tl.float32)
        offset = offset[:, None] if VOCAB_FIRST else offset[None, :]
    x = x + offset  # also where it is 0: without this instruction most kernels use more registers
    if HAS_SOFTCAP:
        # tanh by exp: the interpreter has no libdevice. Both ends saturate without NaN.
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    # On a GPU a plain maximum of NaN and a number is the number.
    return tl.maximum(x * inverse_temperature, NEG, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def unscale_tile(dx, x, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    """The gradient by the products of a gradient by the scaled logits x."""
    if HAS_SOFTCAP:
        ratio = x / (inverse_temperature * softcap)
        dx = dx * (1.0 - ratio * ratio)
    return dx * inverse_temperature


@triton.jit
def gumbel_tile(seed, position, stream, ids):
    """Gumbel noise of int64 seed and position [1, rows] and int32 vocabulary ids [ids, 1]."""
    # Counters and keys stay as small as they broadcast: whole tiles of them would spill.
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = (ids >> 2).to(tl.uint32)
    c1 = position.to(tl.uint32)
    c2 = (position >> 32).to(tl.uint32)
    c3 = tl.zeros_like(c2) + stream
    m0 = tl.full((1, 1), _M0, tl.uint32)
    m1 = tl.full((1, 1), _M1, tl.uint32)
    w0 = tl.full((1, 1), _W0, tl.uint32)
    w1 = tl.full((1, 1), _W1, tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high0 = tl.umulhi(m0, c0)
        high1 = tl.umulhi(m1, c2)
        low0 = m0 * c0
        low1 = m1 * c2
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + w0
        k1 = k1 + w1
    lane = ids & 3
    word = tl.where(lane == 0, c0, tl.where(lane == 1, c1, tl.where(lane == 2, c2, c3)))
    uniform = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, _LARGEST)
    return -tl.log(-log1p_negative(uniform))


@triton.jit
def log1p_negative(u):
    """log(1 - u) for u in (0, 1), precise at small u (Kahan's correction)."""
    v = 1.0 - u
    exact = tl.where(v == 1.0, -u, tl.log(v) * (-u / tl.where(v == 1.0, -1.0, v - 1.0)))
    return exact


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    inputs: Sequence[Any],
    outputs: Sequence[Tensor],
    *sizes: int,
    **options: Any,
) -> None:
    """Runs a kernel of (inputs, outputs, sizes), in the order of its parameters.

    Kernels address tensors as contiguous. Inputs of any other layout are copied, so that a caller
    need not know its operands' strides; a copy of an output would take what is written to it.
    """
    assert all(tensor.is_contiguous() for tensor in outputs)
    inputs = [t.contiguous() if isinstance(t, Tensor) else t for t in inputs]
    device = outputs[0].device
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*inputs, *outputs, *sizes, **options)


def tile_options(config: Config, *hidden: Tensor) -> dict[str, Any]:
    """The tile and the launch options of a kernel whose products are of hidden states [R, D]."""
    nvidia = torch.version.hip is None and not triton_interpreted()
    tile = Tile(
        config.rows,
        config.vocab,
        config.depth,
        even=all(h.shape[1] % config.depth == 0 for h in hidden),
        precision="tf32x3" if nvidia else "ieee",
        upcast=triton_interpreted() and any(h.dtype != torch.float32 for h in hidden),
        described=config.described,
    )
    return {"T": tile, "num_warps": config.warps, "num_stages": config.stages}


def aligned(operand: Tensor) -> Tensor:
    """A contiguous operand [R, D] with zeros after D, up to a multiple of `ALIGNMENT`.

    The products are the same. Rows of any other length begin where no wide copy can, and kernels
    that compute the address of every number spill registers.
    """
    missing = -operand.shape[-1] % ALIGNMENT
    return (F.pad(operand, (0, missing)) if missing else operand).contiguous()


def operand_arguments(config: Config, hidden: Tensor, weight: Tensor) -> tuple[Any, Any]:
    """Contiguous hidden and weight as a kernel takes them: tensors, or descriptors of tiles."""
    if not config.described:
        return hidden, weight
    return (
        TensorDescriptor.from_tensor(hidden, [config.rows, config.depth]),
        TensorDescriptor.from_tensor(weight, [config.vocab, config.depth]),
    )


def scaling_options(
    bias: Tensor | None, temperature: float, softcap: float | None
) -> dict[str, Any]:
    """The arguments of `logits_tile` that scale them."""
    return {
        "softcap": 1.0 if softcap is None else softcap,
        "inverse_temperature": 1.0 / temperature,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
    }


def check_triton(*operands: Tensor | None) -> None:
    """Raises ValueError for dtypes that the kernels do not take."""
    for tensor in operands:
        if tensor is not None and tensor.dtype not in (
            torch.float32,
            torch.bfloat16,
            torch.float16,
        ):
            raise ValueError(
                "the Triton kernels take float32, bfloat16 and float16, got "
                f"{tensor.dtype}; use impl='torch'"
            )
