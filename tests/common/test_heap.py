"""Memory that the C library keeps is given back."""

import os
from pathlib import Path

import pytest
import torch

from mtp.common.heap import free_bytes, release

pytestmark = pytest.mark.skipif(not free_bytes(), reason="needs glibc 2.33 or later")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_holes_in_the_heap_are_given_back():
    # Pieces below the size that glibc maps one by one, with some that stay between them.
    pieces = [torch.ones(1 << 14) for _ in range(2000)]  # 128 MB
    kept = pieces[::50]
    del pieces
    held = resident()
    assert not release(1 << 40)  # not worth it
    assert release(1 << 20)
    assert held - resident() > 90 << 20
    assert all(float(piece.sum()) == 1 << 14 for piece in kept)
