"""Kernel tests run Triton's interpreter, which has to be chosen before triton is imported.

With TRITON_INTERPRET=0 on a machine with a GPU the tests marked `gpu` run instead of skipping.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS gives the same bits every time

import dataclasses  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from functools import partialmethod  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from mtp_kernels import configs, dispatch  # noqa: E402


@pytest.fixture(autouse=True)
def maximum_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's plain maximum of NaN and a number is the number; the interpreter's is NaN."""
    if dispatch.triton_interpreted():
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
            as_on_a_gpu = partialmethod(Builder.binary_op, op=function)
            monkeypatch.setattr(Builder, name, as_on_a_gpu)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends small problems down the chunked paths, several chunks each."""
    monkeypatch.setattr(dispatch, "DIRECT_NUMEL", 0)
    for name in ("CHUNK_BYTES", "CHUNK_BYTES_TALL", "CHUNK_BYTES_DEVICE"):
        monkeypatch.setattr(dispatch, name, 8000)


@pytest.fixture
def tall_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interprets many rows at once: a tile step takes the same time whatever its size."""
    tall = dataclasses.replace(configs.INTERPRET, rows=512)
    monkeypatch.setattr(configs, "INTERPRET", tall)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one rank, for the vocabulary-parallel ops."""
    file = tmp_path_factory.mktemp("rendezvous") / "file"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test draws the same numbers, whichever ran before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """Fills torch.empty with NaN and large integers, so that an unwritten output is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
