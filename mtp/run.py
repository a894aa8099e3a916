"""State that the stages of a run share, and the run's position."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from rich.console import Console

from .config import RunConfig, save_run_config, with_defaults, with_new_keys
from .hub.checkpoint import continue_from, read_state
from .hub.run_folder import MARK, RunFolder, changed_settings
from .reports.loggers import Log
from .rollouts.prompt_format import PromptFormat
from .tasks.base import Example, Task, training_index
from .tasks.projects import own_places
from .training.length_windows import LengthWindows, end_of_window
from .training.runtime import StopRequest
from .training.stage import StageConfig


@dataclass
class Progress:
    """Position of a run. Saved in every checkpoint."""

    stage: int = 0
    """Index among the active stages."""
    step: int = 0
    """Optimizer steps (RL: batches of rollouts) done in the stage."""
    global_step: int = 0
    position: int = 0
    """Number of training examples used so far."""
    bookmark: dict[str, Any] = field(default_factory=dict)
    """A mark by which the task finds that position sooner, see `Task.bookmark`."""
    stage_seconds: float = 0.0
    """Seconds spent in the current stage, over all resumptions."""
    summaries: list[dict[str, Any]] = field(default_factory=list)
    """One entry per finished stage."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """Evaluations so far, for the curves."""
    is_trained: bool = False
    """True once the current stage has taken its steps; its evaluation follows."""
    num_skipped: int = 0
    """Optimizer steps of the current stage left out in a row, see `numbers.not_finite`."""
    best_accuracy: float = 0.0
    """Best accuracy of an evaluation within the current stage; 0 before the first."""
    changed: list[dict[str, Any]] = field(default_factory=list)
    """Settings that differ from those at the run's start: key, then, now and global_step."""


@dataclass
class Run:
    """State that the stages share."""

    config: RunConfig
    folder: Path
    fabric: Fabric
    console: Console
    task: Task
    model: Any
    fmt: PromptFormat
    log: Log
    """Sinks of the run; none in processes other than the first."""
    progress: Progress
    stop: StopRequest
    settings: dict[str, Any]
    """Settings that a checkpoint keeps, see `settings_of`."""
    module: Any = None
    """The model as the current stage wraps it, see `step_module.wrap`; None before the first."""
    ahead: Any = None
    """Rollouts that another process samples, see `groups.Ahead`; None where this one samples."""
    restored_rollouts: list[dict[str, Any]] = field(default_factory=list)
    """Rollouts of the checkpoint that the run continues from, which were asked for ahead."""
    discard: Callable[[], None] | None = None
    """Removes what the run replaces, once it has taken a step; None after that."""
    has_warned: bool = False
    """True after the warning that sampler and replay disagree."""
    has_warned_of_grace: bool = False
    """True after the warning that a step takes longer than `grace_seconds`."""

    def trains(self) -> None:
        """Note that a step is done, or that none was left: what the run replaces is removed."""
        if self.discard is not None:
            self.discard()
            self.discard = None

    @cached_property
    def windows(self) -> LengthWindows:
        """The training examples in windows that are sorted by length."""

        def length(example: Example) -> int:
            return max(len(p) + len(c) for p, c in self.fmt.example_segments(example))

        return LengthWindows(length, self.config.seed)

    def seed_of(self, *purpose: object, rank: int = 0) -> int:
        """Seed of one purpose, the same on every process.

        rank: the process, for noise that only one process uses.
        """
        name = "/".join(map(str, (self.config.seed, rank, *purpose)))
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

    def seed_globals(self, *purpose: object) -> None:
        """Seed every global generator for one purpose, so that none needs to be saved.

        Each process has its own noise there: dropout must differ between its share of a batch and
        another's.
        """
        seed = self.seed_of(*purpose, rank=self.fabric.global_rank)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def row_seeds(self, number: int, *purpose: object) -> torch.Tensor:
        """[number] int64 seeds of one purpose, the same on every process."""
        generator = torch.Generator().manual_seed(self.seed_of(*purpose))
        return torch.randint(2**63 - 1, (number,), generator=generator)

    def stage_folder(self, name: str) -> Path:
        """Folder of the model that a stage saved."""
        return self.folder / "stages" / name


@dataclass
class StageRun:
    """A stage while it runs."""

    name: str
    """Name of the stage."""
    config: StageConfig
    """Its settings."""
    module: Any
    """The run's model as `step_module.wrap` gives it, with the stage's parameters trainable."""
    optimizers: dict[str, torch.optim.Optimizer]
    """Optimizers by emitter; an emitter that is not trained has none."""
    reference: Any
    """Frozen model that loss and reward compare with; None if neither compares."""


def training_example(run: Run, position: int) -> Example:
    """The training example at a position of the run's data."""
    size = run.task.size("train")
    index = training_index(position, size, run.config.seed, run.task.project_size)
    return run.task.example("train", index)


def next_examples(run: Run, number: int, length_window: int = 0) -> dict[int, Example]:
    """The next `number` training examples: this process's share, by their place among them.

    A share holds whole projects of a task that has some.

    length_window: number of steps of `number` examples that are sorted by length together, see
    `LengthWindows`; 0: none.
    """
    rank, world, size = run.fabric.global_rank, run.fabric.world_size, run.task.project_size
    if number % (size * world):
        raise ValueError(
            f"a step's {number} examples must divide evenly over {world} processes, in projects of "
            f"{size}; use another number of examples or of processes"
        )
    begin = run.progress.position
    if length_window:
        # Else each step would cross two batches of a window, whose lengths differ.
        begin = end_of_window(begin, number)
    run.progress.position = begin + number
    places = own_places(number, size, rank, world)
    positions = [begin + place for place in places]
    get = partial(training_example, run)
    if length_window:
        examples = run.windows.examples(positions, number, length_window, get)
    else:
        examples = [get(position) for position in positions]
    return dict(zip(places, examples, strict=True))


def settings_of(config: RunConfig, fabric: Fabric) -> dict[str, Any]:
    """The settings that a checkpoint keeps, with those that depend on the machine."""
    settings = json.loads(json.dumps(asdict(config)))
    settings["fabric"]["processes"] = fabric.world_size
    settings["fabric"]["device_type"] = fabric.device.type
    return settings


def read_start(checkpoint: str, settings: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The state to continue from, whose progress records the settings that have changed.

    Raises ValueError naming the settings that must not change.
    """
    state = read_state(Path(checkpoint))
    progress = state["progress"]
    saved = with_defaults(with_new_keys(state["settings"]), config)
    for key, (then, now) in changed_settings(saved, settings).items():
        progress["changed"].append(
            {"key": key, "then": then, "now": now, "global_step": progress["global_step"]}
        )
    return state


def write_start(folder: RunFolder, config: RunConfig, state: dict[str, Any] | None) -> None:
    """Prepare the run's folder: a new one, or one that continues from `state`."""
    if state is None:
        folder.begin()
    else:
        (folder.path / MARK).touch()
    save_run_config(config, folder.path / "config.yaml")


def discard_what_is_replaced(
    folder: RunFolder, checkpoint: str | None = None, global_step: int = 0
) -> None:
    """Remove what the run replaces, now that it trains: an earlier run, or its own later steps.

    checkpoint: the one of step `global_step` that the run continues from; None for a new run.
    """
    folder.discard_replaced()
    if checkpoint is not None:
        continue_from(Path(checkpoint), global_step)
    (folder.path / "summary.json").unlink(missing_ok=True)
