"""Checkpoints that hold everything a run needs to go on to the very same numbers.

`checkpoints/last.ckpt` is the state within a stage; `stages/<name>/` is the model as a stage left
it, in Hugging Face's layout, which later stages read their frozen references from.
"""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """State of every global generator."""
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` read."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def save_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder under a temporary name, then move it into place.

    A crash leaves the old one or the new one, never a half.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    _remove(temporary)
    write(temporary)
    if path.is_dir():
        old = path.with_name(path.name + ".old")
        _remove(old)
        path.rename(old)
        temporary.rename(path)
        _remove(old)
    else:
        os.replace(temporary, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that a run saved. Raises ValueError if there is none."""
    if not path.is_file():
        raise ValueError(
            f"resume=true needs {path}, which does not exist; start the run without resume"
        )
    return torch.load(path, map_location="cpu", weights_only=False)
