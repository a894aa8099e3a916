"""Measurement for all benchmarks: clocks, turns, medians, peak memory, targets and JSON.

torch is not imported here; if a benchmark has imported it and has a GPU, clocks wait for the GPU,
and memory is that of its allocator.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY_MODEL = [
    "fabric.accelerator=cpu",
    "fabric.num_threads=1",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "head.hidden_size=16",
    "head.intermediate_size=24",
]
"""Overrides of a run on one thread with a model that is as small as a model can be."""


def gpu() -> Any:
    """`torch.cuda` if this process has imported torch and has a GPU, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def wall() -> float:
    """Seconds, once the GPU has done what it was given."""
    device = gpu()
    if device is not None:
        device.synchronize()
    return time.perf_counter()


CLOCKS: dict[str, Callable[[], float]] = {"wall": wall, "cpu": time.process_time}
"""`cpu` is the processor time of this process, for machines that others use too."""


def timed(call: Callable[[], Any], clock: Callable[[], float] = wall) -> tuple[float, Any]:
    """Seconds of a call, and what it returns."""
    began = clock()
    out = call()
    return clock() - began, out


def median_seconds(
    call: Callable[[], Any], repeats: int, clock: Callable[[], float] = wall
) -> float:
    """Median seconds of some calls, after those that the caller has made to warm up."""
    return statistics.median(timed(call, clock)[0] for _ in range(repeats))


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median of each named number over rows that all have it."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def take_turns(
    contenders: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = wall
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each contender, and what it returned. The first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    returned = {}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            taken, returned[name] = timed(run, clock)
            if turn:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}, returned


def reset_peak() -> int:
    """Bytes that the process holds now; `peak_above` counts from here."""
    gc.collect()
    device = gpu()
    if device is not None:
        device.reset_peak_memory_stats()
        return int(device.memory_allocated())
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE")


def peak_above(before: int) -> int:
    """Largest memory since `reset_peak`, above its `before` bytes."""
    device = gpu()
    if device is not None:
        return int(device.max_memory_allocated()) - before
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before


def peak_resident() -> int:
    """Largest resident memory of this process so far, its imports included, or the largest that a
    GPU's allocator has given out; bytes.
    """
    device = gpu()
    if device is not None:
        return int(device.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Target:
    """A number that a benchmark is meant to reach."""

    name: str
    limit: float
    reached: float
    at_most: bool = False
    """True if smaller is better."""

    @property
    def is_met(self) -> bool:
        """Whether the number is reached."""
        return self.reached <= self.limit if self.at_most else self.reached >= self.limit

    def __str__(self) -> str:
        sign, verdict = "<=" if self.at_most else ">=", "met" if self.is_met else "not met"
        return f"target {self.name} {sign} {self.limit:g}: {verdict} ({self.reached:.3g})"


def print_targets(targets: Iterable[Target]) -> bool:
    """A line a target. Returns whether all are met."""
    targets = list(targets)
    for target in targets:
        print(f"  {target}", flush=True)
    return all(target.is_met for target in targets)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """The option `--json`, which all benchmarks have."""
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def print_json(is_asked: bool, content: Any) -> None:
    """The last line of a benchmark with `--json`."""
    if is_asked:
        print(json.dumps(content))
