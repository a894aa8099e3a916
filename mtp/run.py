"""What the stages of a run share, and where the run is."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console

from .config import RunConfig
from .runtime import StopRequest
from .tasks.base import Example, Task, training_index
from .text import TextFormat


@dataclass
class Progress:
    """Where a run is. Saved in every checkpoint."""

    stage: int = 0
    """Index among the active stages."""
    step: int = 0
    """Optimizer steps (RL: batches of rollouts) done in the stage."""
    global_step: int = 0
    position: int = 0
    """Training examples drawn so far."""
    stage_seconds: float = 0.0
    """Spent in the current stage, over all resumptions."""
    summaries: list[dict[str, Any]] = field(default_factory=list)
    """One entry per finished stage."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """Evaluations so far, for the curves."""


@dataclass
class Run:
    """What the stages share."""

    config: RunConfig
    folder: Path
    fabric: Fabric
    console: Console
    task: Task
    model: Any
    came_with_head: bool
    """True if the head was in the checkpoint that the run began from."""
    text: TextFormat
    log: Any
    """`MetricsLog`, or `NoLog` in processes other than the first."""
    progress: Progress
    stop: StopRequest
    reference: Any = None
    """Frozen model that the current stage is held to; None where it is held to none."""

    def seed_of(self, *purpose: object) -> int:
        """Seed of one purpose: a function of the run's seed, the process and the purpose."""
        name = "/".join(map(str, (self.config.seed, self.fabric.global_rank, *purpose)))
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

    def generator(self, *purpose: object) -> torch.Generator:
        """A generator of one purpose, on the model's device."""
        return torch.Generator(device=self.fabric.device).manual_seed(self.seed_of(*purpose))

    def stage_folder(self, name: str) -> Path:
        """The model as a stage left it."""
        return self.folder / "stages" / name


def draw(run: Run, number: int) -> list[Example]:
    """The next `number` training examples, of which this process takes its share."""
    config, progress = run.config, run.progress
    rank, world = run.fabric.global_rank, run.fabric.world_size
    if number % world:
        raise ValueError(f"a step's {number} examples must divide evenly over {world} processes")
    size = run.task.size("train")
    positions = range(progress.position + rank, progress.position + number, world)
    progress.position += number
    return [
        run.task.example("train", training_index(position, size, config.seed))
        for position in positions
    ]
