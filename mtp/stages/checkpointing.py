"""Checkpoints of a run, and the signals that end a run with one."""

import signal
import time
from collections.abc import Mapping
from dataclasses import asdict

from torch.optim import Optimizer

from ..hub.checkpoint import save_checkpoint
from ..run import Run
from ..training.runtime import over_processes
from ..training.sharding import gathered, weights_of
from .numbers import check_weights


class Interrupted(Exception):
    """A signal asked the run to stop, and it has saved a checkpoint."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


def save_run(run: Run, optimizers: Mapping[str, Optimizer], is_best: bool = False) -> None:
    """Write a checkpoint with everything that the run needs to continue.

    All processes call it together: sharded tensors are gathered. So a checkpoint does not depend on
    the processes that wrote it, and any number of them continues from it.
    """
    check_weights(run)
    keep = run.fabric.is_global_zero
    rollouts = [] if run.ahead is None else run.ahead.state(run)
    weights = weights_of(run.model, keep)
    states = {part: gathered(o.state_dict(), keep) for part, o in optimizers.items()}
    if not keep:
        return
    run.progress.bookmark = run.task.bookmark(run.progress.position)
    state = {
        "model": weights,
        "optimizers": states,
        "progress": asdict(run.progress),
        "log": run.log.states(),
        "settings": run.settings,
        "rollouts": rollouts,
    }
    save_checkpoint(run.folder / "checkpoints", run.progress.global_step, state, is_best)


def stop_signal(run: Run) -> int | None:
    """The signal that any process received, so that all processes stop after the same step."""
    mine = run.stop.signal
    flags = {"signal": float(mine or 0), "requeue": float(mine == signal.SIGUSR2)}
    asked = over_processes(run.fabric, flags, "max")
    return signal.SIGUSR2 if asked["requeue"] else int(asked["signal"]) or None


def stop_if_asked(run: Run, where: str) -> None:
    """Raise Interrupted if a signal was received; the run must have just saved a checkpoint."""
    asked = stop_signal(run)
    if asked is not None:
        raise interrupted(run, where, asked)


def check_grace(run: Run, work: str, began: float) -> None:
    """Warn once if work that a signal cannot stop has taken longer than the grace period.

    began: time in seconds, by `time.monotonic`, at which the work began.
    """
    seconds, grace = time.monotonic() - began, run.config.grace_seconds
    if not grace or seconds <= grace or run.has_warned_of_grace:
        return
    run.has_warned_of_grace = True
    run.console.print(
        f"[yellow]warning: {work} took {seconds:.1f} s, longer than grace_seconds={grace:g}: a "
        "signal that comes in between ends the run without a new checkpoint, and it resumes from "
        "the one before; make steps and evaluations smaller, or the grace period longer (with "
        "Slurm hydra.launcher.signal_delay_s)"
    )


def interrupted(run: Run, where: str, number: int) -> Interrupted:
    """The exception that ends a run at a signal."""
    return Interrupted(
        f"stopped {where}; use resume=true to continue from {run.folder}/checkpoints", number
    )
