"""Memory that the C library keeps after it was freed.

glibc serves tensors of up to 32 MB from a heap that seldom shrinks. Sampling leaves it full of
holes of the cache's size, and the activations of a replay, which have other sizes, are put beside
them.
"""

import ctypes
import sys
from typing import Any

WORTH = 256 << 20
"""Free bytes in the heap from which on they are given back: to get them again costs time, too."""
NAMES = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
    "keepcost",
)  # fmt: skip


class _HeapInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def _glibc() -> Any:
    """The C library if it is a glibc that counts its heap (2.33 or later); else None."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not (hasattr(library, "mallinfo2") and hasattr(library, "malloc_trim")):
        return None
    library.mallinfo2.restype = _HeapInfo  # type: ignore[union-attr]
    return library


def free_bytes() -> int:
    """Bytes of the heap that are free; 0 where that is not known."""
    library = _glibc()
    return 0 if library is None else int(library.mallinfo2().fordblks)


def release(least: int = WORTH) -> bool:
    """Give the heap's free pages back to the system if there are `least` bytes of them.

    Returns whether it did.
    """
    library = _glibc()
    if library is None or free_bytes() < least:
        return False
    library.malloc_trim(0)
    return True
