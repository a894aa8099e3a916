"""Shared fixtures. Triton reads its interpreter switch at import, so it is set first of all."""

import os
import shutil
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
from helpers import CLOSE, EOS, config

from mtp.modeling.phases import PhasePlan
from mtp.trainer import train

STACK = ("torch", "triton", "transformers", "numpy", "lightning")


def pytest_report_header() -> str:
    """The stack, printed above the tests (docs/stacks.md)."""
    return ", ".join(f"{name} {version(name)}" for name in STACK)


@pytest.fixture
def plan() -> PhasePlan:
    """Fast until token CLOSE, then slow until EOS; K = 3."""
    return PhasePlan(keep=[4, 1], opened_by=[None, CLOSE], eos_ids=[EOS])


@pytest.fixture(scope="session")
def ended(tmp_path_factory) -> Path:
    """A run that has ended."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    train(config(folder))
    return folder


@pytest.fixture
def copy(ended, tmp_path) -> Path:
    """The same run, to be spoiled."""
    folder = tmp_path / "run"
    shutil.copytree(ended, folder)
    return folder
