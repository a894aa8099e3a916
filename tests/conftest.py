"""Shared fixtures. Triton reads its interpreter switch at import, so it is set first of all."""

import os
from importlib.metadata import version

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
from helpers import CLOSE, EOS

from mtp.modeling.phases import PhasePlan

STACK = ("torch", "triton", "transformers", "numpy", "lightning")


def pytest_report_header() -> str:
    """The stack, printed above the tests (docs/stacks.md)."""
    return ", ".join(f"{name} {version(name)}" for name in STACK)


@pytest.fixture
def plan() -> PhasePlan:
    """Fast until token CLOSE, then slow until EOS; K = 3."""
    return PhasePlan(keep=[4, 1], opened_by=[None, CLOSE], eos_ids=[EOS])
