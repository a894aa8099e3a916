"""Devices, processes and folders of a run: Lightning Fabric from a config, a clean stop on signals,
and errors of the machine reported early and with their place.
"""

import errno
import logging
import os
import platform
import signal
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ..common.bounds import bounded
from .lifeline import watch_start
from .sharding import DTensor, sharded_strategy

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FabricConfig:
    """Arguments of `lightning.Fabric`."""

    accelerator: str = "auto"
    """Kind of device, as lightning names it: `cpu`, `cuda`; `auto`: a GPU if there is one."""
    devices: int = bounded(1, at_least=1, at_most=1024)
    """Number of processes per node, one device each."""
    num_nodes: int = bounded(1, at_least=1, at_most=100_000)
    """Number of machines."""
    strategy: str = "auto"
    """Distribution strategy. `ddp`: a copy of the model on each process. `fsdp2`: weights,
    gradients and optimizer states in shards, one on each process. `auto`: one device, or `ddp`."""
    rollout_weights: str = "layer"
    """Under `fsdp2`, how weights are gathered during sampling. `layer`: layer by layer in every
    pass; all processes run equally many passes. `whole`: once for all passes, for models that fit
    on one device."""
    precision: str = "32-true"
    """Precision: `32-true`, `bf16-mixed` (weights in float32, products in bfloat16) or `bf16-true`
    (weights in bfloat16, as with `model.dtype=bfloat16`)."""
    deterministic: bool = False
    """Only algorithms that give the same bits in every run on the same machine; an operation that
    has none is an error. Slower on a GPU."""
    num_threads: int = bounded(0, at_least=0, at_most=4096)
    """Number of CPU threads of each process; 0 keeps torch's default."""

    def validate(self) -> None:
        """Raises ValueError naming the key of an impossible value."""
        for name, known in (
            ("accelerator", ("auto", "cpu", "gpu", "cuda", "mps")),
            ("strategy", ("auto", "ddp", "fsdp2")),
            ("rollout_weights", ("layer", "whole")),
            ("precision", ("32-true", "bf16-mixed", "bf16-true")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"fabric.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    def _strategy(self) -> Any:
        processes = self.devices * self.num_nodes
        if self.strategy == "fsdp2":
            return sharded_strategy(processes, self.precision)
        if self.strategy == "ddp" or processes > 1:
            # Buffers are the same on all processes, and stay so.
            return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
        return "auto"

    def build(self) -> Fabric:
        """A launched Fabric. Raises ValueError naming the key of an impossible value."""
        self.validate()
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.deterministic)
        if self.num_threads:
            torch.set_num_threads(self.num_threads)
        try:
            fabric = quiet_fabric(
                accelerator=self.accelerator,
                devices=self.devices,
                num_nodes=self.num_nodes,
                strategy=self._strategy(),
                # Fabric's own bf16-true casts buffers, and makes bfloat16 the dtype of new tensors.
                precision="32-true" if self.precision == "bf16-true" else self.precision,
            )
        except (ValueError, RuntimeError, MisconfigurationException) as error:
            raise ValueError(f"fabric could not be set up: {error}") from None
        watch_start(fabric)
        fabric.launch()
        slow = self.precision.startswith("bf16") and fabric.device.type == "cpu"
        if slow and fabric.is_global_zero and not cpu_has_bfloat16():
            _log.warning(
                "fabric.precision=%s: this processor has no instructions for bfloat16 and takes "
                "several times as long for it as for float32; set fabric.precision=32-true, which "
                "needs more memory",
                self.precision,
            )
        return fabric


def cpu_has_bfloat16() -> bool:
    """True if this processor multiplies matrices of bfloat16 by instructions of its own."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # With AVX-512 alone oneDNN computes bfloat16 too, in float32, between two conversions.
    own = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return own or platform.machine().lower() not in ("x86_64", "amd64")


def quiet_fabric(**given: Any) -> Fabric:
    """`Fabric(**given)` without lightning's hint about srun, which every run on a machine that has
    Slurm would print.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun` command is available")
        return Fabric(**given)


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

    def __init__(self, message: str, batch: Path | None = None):
        """batch: the file that holds what the result was computed from."""
        super().__init__(message)
        self.batch = batch


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
        if isinstance(error, NotFinite) and error.batch is not None:
            remedy += f"; the batch is in {error.batch}"
        raise NotFinite(f"{where()}: {cause}; {remedy}") from error


def weight_that_is_not_finite(model: torch.nn.Module) -> str | None:
    """Name of the first weight that holds NaN or infinity; None if there is none."""
    try:
        for name, parameter in model.named_parameters():
            mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if not bool(mine.isfinite().all()):
                return str(name)
    except RuntimeError:  # after a failed assertion on a GPU nothing can be read from it
        return None
    return None


SECONDS_TO_LIVE = 600.0
"""Seconds that a process whose job is queued again waits for Slurm to end it."""


class StopRequest:
    """Turns the first Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 into a flag; a second Ctrl-C
    stops at once.

    Of several signals SIGUSR2 takes precedence: a launcher requeues the job by it. SIGHUP, by which
    a terminal ends its programs as it closes, stays ignored under `nohup`.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            leave_terminal()
        if self.signal != signal.SIGUSR2:
            self.signal = number


def leave_terminal() -> None:
    """Send output that goes to a terminal nowhere from now on: writing to a closed one fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # isatty denies a terminal that is closed
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def hand_on(number: int) -> None:
    """Let submitit's handler of SIGUSR2 act now that the checkpoint is saved.

    It queues the job again and ends the process, or, in a task of the job that is not the first,
    returns: wait there for Slurm to end it. After any other signal, and without such a handler, the
    caller ends the run.
    """
    handler = signal.getsignal(number)
    if number != signal.SIGUSR2 or not callable(handler):
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


def all_of(fabric: Fabric, mine: T) -> list[T]:
    """`mine` of every process, by rank, on every process. Its tensors must be on the CPU."""
    if fabric.world_size == 1:
        return [mine]
    found: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(found, mine)
    return found


def over_processes(fabric: Fabric, values: dict[str, float], op: str) -> dict[str, float]:
    """The `sum`, `max` or `min` of each number over all processes, which have the same names."""
    if fabric.world_size == 1:
        return values
    names = sorted(values)
    mine = torch.tensor([values[n] for n in names], device=fabric.device, dtype=torch.float64)
    reduced = torch.as_tensor(fabric.all_reduce(mine, reduce_op=op))
    return dict(zip(names, reduced.tolist(), strict=True))
