"""Devices and processes: Lightning Fabric from a config, and a clean stop on signals."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric


@dataclass(kw_only=True)
class FabricConfig:
    """Arguments of `lightning.Fabric`."""

    accelerator: str = "auto"
    devices: int = 1
    """Processes per node, one device each."""
    num_nodes: int = 1
    strategy: str = "auto"
    """`auto` (one device, or DDP) or `ddp`."""
    precision: str = "32-true"
    """`32-true`, `bf16-mixed` or `bf16-true`."""
    num_threads: int = 0
    """CPU threads of each process; 0 leaves torch's own choice."""

    def build(self) -> Fabric:
        """A launched Fabric. Raises ValueError naming the key of an impossible value."""
        if self.precision not in ("32-true", "bf16-mixed", "bf16-true"):
            raise ValueError(
                f"fabric.precision must be 32-true, bf16-mixed or bf16-true, got {self.precision!r}"
            )
        if self.strategy not in ("auto", "ddp"):
            raise ValueError(f"fabric.strategy must be auto or ddp, got {self.strategy!r}")
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
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"fabric could not be set up: {error}") from None
        fabric.launch()
        return fabric


SECONDS_TO_LIVE = 600.0
"""How long a job that Slurm has asked to stop waits for it to end the process."""


class StopRequest:
    """Turns the first Ctrl-C, SIGTERM, SIGUSR1 or 2 into a flag; a second Ctrl-C stops at once.

    Of several signals SIGUSR2 counts: by it a launcher queues the job again.
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

    Submitit's handler of SIGUSR2 queues the job again and ends the process; that of SIGTERM ignores
    it, since Slurm queues a preempted job again only if it has not ended by itself: so wait for
    Slurm to end it. Without a launcher's handler the caller ends the run.
    """
    handler = signal.getsignal(number)
    if not callable(handler) or handler is signal.default_int_handler:
        return
    handler(number, None)
    if "SLURM_JOB_ID" in os.environ:
        time.sleep(SECONDS_TO_LIVE)


T = TypeVar("T")


def on_first_process(fabric: Fabric, function: Callable[[], T]) -> T:
    """Call `function` on the first process and give every process its result.

    Raises on every process the ValueError that it raised, so that none waits for another.
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
    """The `sum` or `max` of each number over all processes, which must hold the same names."""
    if fabric.world_size == 1:
        return values
    names = sorted(values)
    mine = torch.tensor([values[n] for n in names], device=fabric.device, dtype=torch.float64)
    reduced = torch.as_tensor(fabric.all_reduce(mine, reduce_op=op))
    return dict(zip(names, reduced.tolist(), strict=True))
