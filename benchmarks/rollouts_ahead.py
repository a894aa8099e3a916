"""RL with rollouts of a second process, against the same run without one: seconds and accuracy.

    python benchmarks/rollouts_ahead.py [--json] [--steps 1000] [--seed 1] [--folder runs/ahead]

`rl_proof/executed_open`, from one model that `rl_proof/start` trained, in turn:

    one core    this process samples and trains, on one thread
    two cores   the same on two threads
    lag 0       a second process samples, the first trains and waits for it: one thread each
    lag 1       the second samples the next step's rollouts meanwhile: one thread each

Prints seconds per step (medians; `waited` is that of `rollout_time`: sampling, or waiting for it),
and accuracy in per cent of the held-out problems at the end. All variants begin from one model and
continue where they were stopped. Needs Ray (the extra `ray`) and two idle cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from measure import add_json_option, print_json

ROOT = Path(__file__).parents[1]
CORRECTED = [
    "stages.rl.rollouts.recompute_old=true",
    "stages.rl.objective.policy.correction_cap=2",
]
VARIANTS = {
    "one core": ["fabric.num_threads=1"],
    "two cores": ["fabric.num_threads=2"],
    "lag 0": ["fabric.num_threads=1", "stages.rl.rollouts.lag=0"],
    "lag 1": ["fabric.num_threads=1", "stages.rl.rollouts.lag=1", *CORRECTED],
}


def run(folder: Path, *overrides: str) -> None:
    """Start a run in a folder, or continue it."""
    command = [sys.executable, "train.py", f"run_dir={folder}", "resume=auto", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def measured(folder: Path) -> dict[str, float]:
    """Seconds per step and accuracy of a run that has ended."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "rollout_time" in line]
    (last,) = json.loads((folder / "summary.json").read_text())["stages"]
    return {
        "seconds_per_step": statistics.median(one["step_time"] for one in steps),
        "waited": statistics.median(one["rollout_time"] for one in steps),
        "fast_accuracy": 100 * last["fast_accuracy"],
        "slow_accuracy": 100 * last["slow_accuracy"],
        "true_steps": 100 * last["true_steps"],
    }


def main() -> None:
    """Train the variants one after the other, and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json_option(parser)
    parser.add_argument("--steps", type=int, default=1000, help="RL steps of each variant")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/ahead"))
    args = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    folder = args.folder.absolute()
    given = [f"seed={args.seed}", "logger.log_every=1"]
    run(folder / "start", "experiment=rl_proof/start", "fabric.num_threads=2", *given)
    found = {}
    for name, overrides in VARIANTS.items():
        path = folder / name.replace(" ", "_")
        run(
            path,
            "experiment=rl_proof/executed_open",
            f"model.source={folder}/start/stages/joint",
            f"evaluation.reference={folder}/start/stages/main",
            f"stages.rl.steps={args.steps}",
            "stages.rl.evaluate_every=0",
            *given,
            *overrides,
        )
        found[name] = measured(path)
    columns = list(found["lag 1"])
    print(f"{'':10}" + "".join(f"{column:>18}" for column in columns))
    for name, values in found.items():
        print(f"{name:10}" + "".join(f"{values[column]:18.3f}" for column in columns))
    print_json(args.json, {"steps": args.steps, "seed": args.seed, "variants": found})


if __name__ == "__main__":
    main()
