"""Tile sizes of every shipped Triton kernel on every supported architecture.

One table, read by the launchers and by the ahead-of-time gate (`python -m mtp_kernels.aot`). There
is no autotuning: a result must not depend on which tile size won a race.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_kernels.dispatch import triton_interpreted


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one kernel."""

    rows: int
    """Rows of hidden states per tile."""
    vocab: int
    """Vocabulary ids per tile."""
    depth: int
    """Elements of D per step of the product."""
    warps: int = 8
    """Warps per program."""
    stages: int = 3
    """Tiles in flight in the software pipeline."""
    described: bool = False
    """True where operands are read through tensor descriptors by bulk copies (TMA)."""


TRAIN = Config(rows=128, vocab=128, depth=64)
NARROW = Config(rows=128, vocab=64, depth=64)
"""For kernels that hold a second tile, the teacher's, beside the product."""
ELEMENTWISE = Config(rows=1, vocab=4096, depth=1, warps=4, stages=1)
DECODE = Config(rows=16, vocab=128, depth=64, warps=4, stages=4)
DECODE_TWO = Config(rows=16, vocab=128, depth=64, warps=4)
"""For the kernel that makes two products a tile."""
HOPPER = Config(rows=128, vocab=256, depth=64, described=True)
"""Bulk copies need no registers for addresses, so that a tile may be wider."""
HOPPER_STORE = Config(rows=128, vocab=128, depth=64, stages=4, described=True)
"""For kernels that write their tile: twice the width spills there."""
INTERPRET = Config(rows=16, vocab=32, depth=32, warps=1, stages=1)
ALIGNMENT = 16
"""Numbers in a row of which the JIT compiler makes wide copies: D is padded to a multiple."""

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = (
    "row_stats",
    "row_stats_store",
    "row_gradient",
    "gradient_from_logits",
    "kl_stats",
    "kl_gradient",
    "sample",
    "residual",
)
_DEFAULTS = {
    "gradient_from_logits": ELEMENTWISE,
    "kl_stats": NARROW,
    "sample": DECODE,
    "residual": DECODE_TWO,
}
_EXCEPTIONS = {
    ("kl_stats", "sm_90"): Config(rows=64, vocab=64, depth=64, warps=4, stages=4),
    ("row_stats_store", "sm_89"): NARROW,
    ("row_stats_store", "sm_100"): NARROW,
    ("row_stats_store", "sm_120"): NARROW,
    ("sample", "sm_100"): replace(DECODE, warps=8),
    ("residual", "sm_100"): replace(DECODE_TWO, vocab=64, warps=8),
    ("residual", "gfx942"): replace(DECODE_TWO, vocab=64),
}

OF_LOGITS = {"row_stats_store", "row_gradient", "kl_stats", "kl_gradient"}
"""Kernels that read or write rows of V numbers. Where V is not aligned they compute an address for
each number, and have registers for half a tile."""

_FLOAT32: dict[tuple[str, str], dict[str, Any]] = {
    ("residual", "sm_80"): {"warps": 8},
    ("residual", "sm_89"): {"warps": 8},
    ("residual", "sm_120"): {"warps": 8},
    ("row_stats", "sm_120"): {"vocab": 32},
    ("row_stats_store", "sm_120"): {"vocab": 32},
    ("kl_stats", "sm_120"): {"vocab": 32},
}
"""Changes for float32 operands."""

_DESCRIBED = {
    ("row_stats", "sm_90"): HOPPER,
    ("row_stats_store", "sm_90"): HOPPER_STORE,
    ("row_gradient", "sm_90"): replace(HOPPER_STORE, warps=4, stages=3),
    ("kl_gradient", "sm_90"): HOPPER_STORE,
}
"""For 16-bit operands that can be read through tensor descriptors."""
_DESCRIBED_SOFTCAP = {("row_gradient", "sm_90"): HOPPER_STORE}
"""The same with a softcap, where four warps have too few registers."""


def shipped_config(
    kernel: str,
    architecture: str,
    dtype: torch.dtype,
    described: bool = True,
    is_aligned: bool = True,
    has_softcap: bool = False,
) -> Config:
    """The configuration of a kernel on an architecture, for operands of a dtype.

    described: whether the operands can be read through tensor descriptors; is_aligned: whether the
    vocabulary is a multiple of `ALIGNMENT`; has_softcap: whether the logits have one.
    """
    is_narrow = not is_aligned and kernel in OF_LOGITS
    described_configs = _DESCRIBED | (_DESCRIBED_SOFTCAP if has_softcap else {})
    if described and not is_narrow and dtype != torch.float32:
        found = described_configs.get((kernel, architecture))
        if found is not None:
            return found
    config = _EXCEPTIONS.get((kernel, architecture), _DEFAULTS.get(kernel, TRAIN))
    if architecture.startswith("gfx"):
        config = replace(config, stages=min(2, config.stages))  # its pipeline has two buffers
    if dtype == torch.float32 and config.depth > 1:
        config = replace(config, depth=config.depth // 2)  # the same bytes in flight
        if config.rows == TRAIN.rows and not architecture.startswith("gfx"):
            config = replace(config, vocab=64)  # three TF32 products of 128 x 128 spill
    if dtype == torch.float32:
        config = replace(config, **_FLOAT32.get((kernel, architecture), {}))
    if is_narrow:
        config = replace(config, vocab=min(config.vocab, 32 if dtype == torch.float32 else 64))
    return config


def config_for(kernel: str, *operands: Tensor, has_softcap: bool = False) -> Config:
    """The configuration of a kernel for the device, dtype and layout of its operands.

    The last operand of a kernel of `OF_LOGITS` is the weight [V, D].
    """
    if triton_interpreted():
        return INTERPRET
    architecture = architecture_of(operands[0].device.index or 0)
    described = all(describable(operand) for operand in operands)
    is_aligned = operands[-1].shape[0] % ALIGNMENT == 0
    return shipped_config(
        kernel, architecture, operands[0].dtype, described, is_aligned, has_softcap
    )


def describable(operand: Tensor) -> bool:
    """True if rows of a contiguous [R, D] begin at multiples of 16 bytes, as bulk copies need."""
    row = operand.shape[-1] * operand.element_size()
    return operand.data_ptr() % 16 == 0 and row % 16 == 0


@functools.cache
def architecture_of(index: int) -> str:
    """The architecture whose table a device uses. Raises ValueError for one that is too old."""
    if torch.version.hip is not None:
        return "gfx942"
    # A device without a table of its own uses that of an architecture with no more shared memory.
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise ValueError(
            f"the Triton kernels need compute capability 8.0 or later, got {major}; "
            "use impl='torch'"
        )
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


@functools.cache
def num_processors(index: int) -> int:
    """Streaming multiprocessors (compute units) of a device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


class Grid(NamedTuple):
    """Programs of a kernel that walks over parts of the vocabulary."""

    row_tiles: int
    """Tiles of rows."""
    splits: int
    """Parts of the vocabulary, walked over side by side."""
    per_split: int
    """Tiles of the vocabulary in a part; the last part may have fewer."""


def split_grid(rows: int, vocab: int, config: Config, device: torch.device) -> Grid:
    """The number of vocabulary parts that gives eight waves of programs on a device."""
    row_tiles, vocab_tiles = -(-rows // config.rows), -(-vocab // config.vocab)
    if triton_interpreted():
        wanted = 2
    else:
        wanted = -(-8 * num_processors(device.index or 0) // max(row_tiles, 1))
    per_split = -(-vocab_tiles // max(1, min(wanted, vocab_tiles)))
    return Grid(row_tiles, -(-vocab_tiles // per_split), per_split)
