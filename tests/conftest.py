"""Shared fixtures. Triton reads its interpreter switch at import, so it is set first of all."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
from helpers import CLOSE, EOS

from mtp.modeling.phases import PhasePlan


@pytest.fixture
def plan() -> PhasePlan:
    """Fast until token CLOSE, then slow until EOS; K = 3."""
    return PhasePlan(keep=[4, 1], opened_by=[None, CLOSE], eos_ids=[EOS])
