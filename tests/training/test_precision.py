"""A run says where its precision is slow."""

import logging

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
