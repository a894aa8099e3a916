"""Devices, processes and folders of a run: Lightning Fabric from a config, a clean stop on signals,
and errors of the machine reported early and with their place.
"""

import errno
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ..common.bounds import bounded


@dataclass(kw_only=True)
class FabricConfig:
    """Arguments of `lightning.Fabric`."""

    accelerator: str = "auto"
    devices: int = bounded(1, at_least=1, at_most=1024)
    """Number of processes per node, one device each."""
    num_nodes: int = bounded(1, at_least=1, at_most=100_000)
    strategy: str = "auto"
    """Distribution strategy: `auto` (one device, or DDP) or `ddp`."""
    precision: str = "32-true"
    """Precision: `32-true`, `bf16-mixed` or `bf16-true`."""
    num_threads: int = bounded(0, at_least=0, at_most=4096)
    """Number of CPU threads of each process; 0 keeps torch's default."""

    def validate(self) -> None:
        """Raises ValueError naming the key of an impossible value."""
        for name, known in (
            ("accelerator", ("auto", "cpu", "gpu", "cuda", "mps")),
            ("strategy", ("auto", "ddp")),
            ("precision", ("32-true", "bf16-mixed", "bf16-true")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"fabric.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    def build(self) -> Fabric:
        """A launched Fabric. Raises ValueError naming the key of an impossible value."""
        self.validate()
        if self.num_threads:
            torch.set_num_threads(self.num_threads)
        try:
            fabric = Fabric(
                accelerator=self.accelerator,
                devices=self.devices,
                num_nodes=self.num_nodes,
                strategy=self.strategy,
                precision=self.precision,  # type: ignore[arg-type]
            )
        except (ValueError, RuntimeError, MisconfigurationException) as error:
            raise ValueError(f"fabric could not be set up: {error}") from None
        fabric.launch()
        return fabric


def check_writable(folder: Path, key: str) -> None:
    """Raise ValueError naming `key` if a folder cannot be made and written; leave no trace.

    A megabyte is written next to it, so that a full disk is found before a model is built.
    """
    path = os.path.abspath(folder)
    below: list[str] = []
    while not os.path.lexists(path):
        path, name = os.path.split(path)
        below.append(name)
    try:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", path)
        if below and len(os.fsencode(max(below, key=len))) > os.pathconf(path, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, "a name in it is too long", path)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(1 << 20))
    except OSError as error:
        raise ValueError(
            f"{key}={folder} cannot be written: {error.strerror} ({path}); give another folder"
        ) from None


class NotFinite(ValueError):
    """A result that should be a number is NaN or infinite."""


@contextmanager
def naming_what_is_not_finite(model: torch.nn.Module, where: Callable[[], str]) -> Iterator[None]:
    """Add place and weight to an error that numbers which are not finite cause.

    Libraries report only that a distribution cannot be sampled from. Raises `NotFinite`; any other
    error passes.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        weight = weight_that_is_not_finite(model)
        if weight is not None:
            cause = f"the weight {weight} is not finite"
        elif isinstance(error, NotFinite):
            cause = str(error)
        else:
            raise
        remedy = "lower the learning rate or the clip_norm, or resume from an earlier checkpoint"
        raise NotFinite(f"{where()}: {cause}; {remedy}") from error


def weight_that_is_not_finite(model: torch.nn.Module) -> str | None:
    """Name of the first weight that holds NaN or infinity; None if there is none."""
    try:
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                return str(name)
    except RuntimeError:  # after a failed assertion on a GPU nothing can be read from it
        return None
    return None


SECONDS_TO_LIVE = 600.0
"""Seconds that a job which Slurm has asked to stop waits for Slurm to end the process."""


class StopRequest:
    """Turns the first Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 into a flag; a second Ctrl-C stops at
    once.

    Of several signals SIGUSR2 takes precedence: a launcher requeues the job by it.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal != signal.SIGUSR2:
            self.signal = number


def hand_on(number: int) -> None:
    """Let a launcher's own handler act on a signal now that the checkpoint is saved.

    Submitit's handler of SIGUSR2 requeues the job and ends the process. Its handler of SIGTERM
    ignores the signal, since Slurm requeues a preempted job only if the job has not ended by
    itself: so wait for Slurm to end it. Without a launcher's handler the caller ends the run.
    """
    handler = signal.getsignal(number)
    if number == signal.SIGINT or not callable(handler):
        return
    handler(number, None)
    if "SLURM_JOB_ID" in os.environ:
        time.sleep(SECONDS_TO_LIVE)


T = TypeVar("T")


def on_first_process(fabric: Fabric, function: Callable[[], T]) -> T:
    """Call `function` on the first process and give every process its result.

    Raises its ValueError on every process, so that none waits for another.
    """
    if fabric.world_size == 1:
        return function()
    outcome: Any = None
    if fabric.is_global_zero:
        try:
            outcome = (True, function())
        except ValueError as error:
            outcome = (False, str(error))
    is_done, value = fabric.broadcast(outcome)
    if not is_done:
        raise ValueError(value)
    return value


def over_processes(fabric: Fabric, values: dict[str, float], op: str) -> dict[str, float]:
    """The `sum`, `max` or `min` of each number over all processes, which have the same names."""
    if fabric.world_size == 1:
        return values
    names = sorted(values)
    mine = torch.tensor([values[n] for n in names], device=fabric.device, dtype=torch.float64)
    reduced = torch.as_tensor(fabric.all_reduce(mine, reduce_op=op))
    return dict(zip(names, reduced.tolist(), strict=True))
