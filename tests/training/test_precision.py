"""A run says where its precision is slow."""

import logging
from pathlib import Path

import pytest

from mtp.training import runtime
from mtp.training.runtime import FabricConfig


@pytest.mark.parametrize(
    "precision, has, told",
    [("bf16-mixed", False, True), ("bf16-mixed", True, False), ("32-true", False, False)],
)
def test_bfloat16_without_instructions_for_it_is_told(caplog, monkeypatch, precision, has, told):
    monkeypatch.setattr(runtime, "cpu_has_bfloat16", lambda: has)
    with caplog.at_level(logging.WARNING):
        FabricConfig(accelerator="cpu", precision=precision).build()
    assert ("fabric.precision=bf16-mixed: this processor has no" in caplog.text) is told


CPUINFO = Path("/proc/cpuinfo")
FLAGS = CPUINFO.read_text().partition("\nflags")[2].partition("\n")[0] if CPUINFO.exists() else ""


@pytest.mark.skipif("avx2" not in FLAGS.split(), reason="needs Linux on x86-64 with AVX2")
def test_a_processor_has_bfloat16_where_its_flags_name_it():
    """AVX-512 alone is not enough, though oneDNN computes bfloat16 with it."""
    named = bool({"avx512_bf16", "amx_bf16"} & set(FLAGS.split()))
    assert runtime.cpu_has_bfloat16() is named
