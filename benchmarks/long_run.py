"""Memory and open files of a long run: both must stay as they are after its first fifth.

    python benchmarks/long_run.py [--steps 5000] [--rl-steps 200] [--json]

A small run (supervised steps, then RL steps, with checkpoints and interim evaluations) is started
in a process of its own, whose resident memory and number of open files are read while it trains.
They are compared by medians: of the second fifth of a stage's steps and of its last fifth. Exit
code 1 if memory has grown by more than 16 MB in a stage, or open files at all.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import TINY_MODEL, add_json_option, print_json

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from mtp.reports.json_lines import parse_records  # noqa: E402

MOST = 16.0
"""Megabytes that a stage may grow by: memory that the allocator keeps varies by this much."""
OVERRIDES = [
    "stages.head.steps=0",
    "stages.joint.steps=0",
    "stages.main.examples.batch_size=4",
    "stages.rl.rollouts.num_prompts=2",
    "stages.rl.rollouts.group_size=4",
    "evaluation.num_problems=8",
    "evaluation.num_interim_problems=4",
    *TINY_MODEL,
    "logger.log_every=5",
    "checkpoint_minutes=0.1",
]


def sample(process: int) -> tuple[float, int]:
    """Resident megabytes and number of open files of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{process}/fd"))


def watch(process: subprocess.Popen, log: Path) -> dict[str, list[tuple[int, float, int]]]:
    """Samples of each stage until a run ends: step of the stage, megabytes, open files."""
    found: dict[str, list[tuple[int, float, int]]] = {}
    read, last = 0, None
    while process.poll() is None:
        time.sleep(0.25)
        if not log.is_file():
            continue
        with log.open("rb") as file:
            file.seek(read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        read += len(whole)
        records = [record for record in parse_records(whole)[0] if "loss" in record]
        if records:
            last = records[-1]
            try:
                found.setdefault(last["stage"], []).append((last["step"], *sample(process.pid)))
            except (FileNotFoundError, ProcessLookupError):
                break
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, metavar="N", help="supervised")
    parser.add_argument("--rl-steps", type=int, default=200, metavar="N", help="of RL")
    add_json_option(parser)
    arguments = parser.parse_args()
    steps = {"main": arguments.steps, "rl": arguments.rl_steps}
    with tempfile.TemporaryDirectory(prefix="long-run-") as folder:
        command = [sys.executable, "train.py", *OVERRIDES, f"run_dir={folder}/run"]
        for stage, number in steps.items():
            command += [f"stages.{stage}.steps={number}"]
            command += [f"stages.{stage}.evaluate_every={max(1, number // 20)}"]
        with open(f"{folder}/log", "w+") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
            found = watch(process, Path(folder) / "run" / "metrics.jsonl")
            if process.wait():
                output.seek(0)
                raise SystemExit(f"the run failed:\n{output.read()[-3000:]}")
    is_flat, results = True, {}
    for stage, number in steps.items():
        if not number:
            continue
        parts = [
            [one[1:] for one in found[stage] if low * number <= one[0] <= high * number]
            for low, high in ((0.2, 0.4), (0.8, 1.0))
        ]
        early, late = (
            [statistics.median(column) for column in zip(*p, strict=True)] for p in parts
        )
        grown = late[0] - early[0]
        is_flat = is_flat and grown <= MOST and late[1] <= early[1]
        results[stage] = {"megabytes": [early[0], late[0]], "files": [early[1], late[1]]}
        print(
            f"{stage}, {number} steps: {early[0]:.1f} -> {late[0]:.1f} MB ({grown:+.1f}), "
            f"{early[1]:.0f} -> {late[1]:.0f} open files, {len(found[stage])} samples"
        )
    print_json(arguments.json, results)
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
