"""Runs of one comparison as a table of arms: what each mean is, over seeds, and how sure.

`python -m mtp.reports.comparison FOLDER` prints the table over the arms of a comparison, such as
runs/rl_proof, and writes its summary.json, arms.png and frontier.png.

An arm is what its runs' names share: `rl_proof/executed_open/3` is seed 3 of arm `executed_open`.
Runs of the arm `start` are where the others began. Figures are those of a run's last stage.

Left out: tests between arms, and an interval where only one seed has ended.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .interval import interval
from .logger import read_records
from .progress import make_console
from .tables import cell

WITH_INTERVAL = ("fast_accuracy", "slow_accuracy", "true_steps")
MEANS = (
    "empty_thought_accuracy",
    "wrong_thought_accuracy",
    "fast_passes",
    "reference_nats_per_token",
    "unigram_drift",
)
START = "start"


@dataclass(frozen=True)
class ArmRun:
    """A run that has ended."""

    arm: str
    seed: int
    figures: dict[str, Any]
    """Of its last stage."""
    curve: list[tuple[int, float]]
    """(step, fast accuracy) of its last stage's evaluations."""


def read_runs(folder: Path) -> list[ArmRun]:
    """All runs that have ended below a folder.

    Raises ValueError if there are none, or if two are of one arm and seed.
    """
    found: dict[tuple[str, int], Path] = {}
    runs = []
    for path in sorted(folder.rglob("summary.json")):
        home = path.parent
        if not (home / "config.yaml").is_file():
            continue
        config = yaml.safe_load((home / "config.yaml").read_text())
        parts = PurePosixPath(config["name"]).parts
        if len(parts) < 2:
            continue
        key = parts[-2], int(config["seed"])
        if key in found:
            raise ValueError(
                f"{home} and {found[key]} are both seed {key[1]} of {key[0]}; keep one of them"
            )
        found[key] = home
        last = json.loads(path.read_text())["stages"][-1]
        curve = [
            (record["step"], record["eval/fast_accuracy"])
            for record in read_records(home / "metrics.jsonl")
            if record["stage"] == last["name"] and record.get("eval/fast_accuracy") is not None
        ]
        runs.append(ArmRun(*key, last, curve))
    if not runs:
        raise ValueError(
            f"{folder} holds no run of an arm that has ended; give the folder of a comparison, "
            "such as runs/rl_proof, whose runs are named COMPARISON/ARM/SEED"
        )
    return runs


def aggregate(runs: list[ArmRun]) -> dict[str, Any]:
    """What `summary.json` of a comparison holds: `{"arms": {arm: figures}}`."""
    starts = {run.seed: run.figures for run in runs if run.arm == START}
    arms: dict[str, Any] = {}
    for arm in dict.fromkeys(run.arm for run in runs if run.arm != START):
        mine = sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed)
        began = [starts.get(run.seed, {}).get("fast_accuracy") for run in mine]
        arms[arm] = {
            "seeds": [run.seed for run in mine],
            "start_fast_accuracy": _mean(began),
            **{name: _mean([run.figures.get(name) for run in mine]) for name in MEANS},
            **{name: _interval([run.figures.get(name) for run in mine]) for name in WITH_INTERVAL},
        }
    return {"arms": arms}


def _mean(values: list[float | None]) -> float | None:
    """The mean; None if a run lacks the figure."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _interval(values: list[float | None]) -> dict[str, float | None]:
    """Mean and the ends of its interval; no ends for a single run."""
    if len(values) < 2:
        return {"mean": values[0], "low": None, "high": None}
    center, half = interval(values)
    if center is None or half is None:
        return {"mean": None, "low": None, "high": None}
    return {"mean": center, "low": center - half, "high": center + half}


def save_plot(runs: list[ArmRun], summary: dict[str, Any], path: Path) -> None:
    """Fast accuracy over steps, a line an arm, and each arm's figures with their intervals."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    arms = list(summary["arms"])
    colors = [colormaps["tab10"](i % 10) for i in range(len(arms))]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, color in zip(arms, colors, strict=True):
        curves = [dict(run.curve) for run in runs if run.arm == arm and run.curve]
        for curve in curves:
            left.plot(list(curve), list(curve.values()), color=color, alpha=0.2, linewidth=1)
        shared = sorted(set.intersection(*map(set, curves))) if curves else []
        means = [sum(curve[step] for curve in curves) / len(curves) for step in shared]
        left.plot(shared, means, color=color, label=arm)
    left.set(xlabel="step of RL", ylabel="fast accuracy, held-out", ylim=(-0.03, 1.03))
    left.legend(fontsize=7)
    for offset, (name, marker) in enumerate(zip(WITH_INTERVAL, "osD", strict=True)):
        for row, (arm, color) in enumerate(zip(arms, colors, strict=True)):
            value = summary["arms"][arm][name]
            at = row + 0.2 * (offset - 1)
            label = name.replace("_", " ") if row == 0 else None
            if value["mean"] is not None:
                right.plot(value["mean"], at, marker, color=color, markersize=5, label=label)
            if value["low"] is not None:
                right.plot([value["low"], value["high"]], [at, at], color=color)
    right.set(yticks=range(len(arms)), yticklabels=arms, xlabel="mean, 95 % interval")
    right.invert_yaxis()
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


FRONTIER = {"true_steps": "true steps", "reference_nats_per_token": "reference nats per token"}
"""What is weighed against fast accuracy."""


def save_frontier(runs: list[ArmRun], summary: dict[str, Any], path: Path) -> None:
    """Fast accuracy over legibility: each run, and the mean of each arm.

    Draws what of `FRONTIER` all runs have been measured for; no plot where that is nothing.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    arms = summary["arms"]

    def mean_of(arm: str, name: str) -> float | None:
        value = arms[arm][name]
        return value["mean"] if isinstance(value, dict) else value

    fast = {arm: mean_of(arm, "fast_accuracy") for arm in arms}
    names = [n for n in FRONTIER if all(mean_of(arm, n) is not None for arm in arms)]
    if not names or None in fast.values():
        return
    size = (5.5 * len(names), 4.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        for i, arm in enumerate(arms):
            color = colormaps["tab10"](i % 10)
            points = [(r.figures[name], r.figures["fast_accuracy"]) for r in runs if r.arm == arm]
            axes.plot(*zip(*points, strict=True), ".", color=color, alpha=0.4)
            axes.plot(mean_of(arm, name), fast[arm], "o", color=color, label=arm)
        axes.set(xlabel=f"{FRONTIER[name]}, fast mode", ylabel="fast accuracy, held-out")
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


ARM_COLUMNS = {
    "start_fast_accuracy": "start",
    "fast_accuracy": "fast",
    "slow_accuracy": "slow",
    "true_steps": "true steps",
    "empty_thought_accuracy": "empty",
    "wrong_thought_accuracy": "wrong",
    "fast_passes": "passes",
    "reference_nats_per_token": "nats",
}
"""Accuracy at the start and after, in fast and slow mode, behind an empty and a wrong thought."""


def print_arms(console: Console, summary: dict[str, Any]) -> None:
    """One row an arm."""
    table = Table(title="held-out accuracy by arm: means over seeds, ± half the 95 % interval")
    table.add_column("arm")
    for title in ("seeds", *ARM_COLUMNS.values()):
        table.add_column(title, justify="right", no_wrap=True)
    for arm, figures in summary["arms"].items():
        cells = [arm_cell(name, figures[name]) for name in ARM_COLUMNS]
        table.add_row(escape(arm), str(len(figures["seeds"])), *cells)
    console.print(table)


def arm_cell(name: str, value: Any) -> str:
    """A mean as the table shows it, with its interval where it has one."""
    if not isinstance(value, dict):
        return cell(name, value)
    if value["low"] is None:
        return cell(name, value["mean"])
    return f"{100 * value['mean']:.1f} ± {100 * (value['high'] - value['mean']):.1f} %"


def main(argv: list[str] | None = None) -> int:
    """Print the table over a comparison's arms; the exit code is 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m mtp.reports.comparison",
        description="Print the table over the arms of a comparison; write summary.json, "
        "arms.png and frontier.png (fast accuracy against legibility) beside them.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="of a comparison, such as runs/rl_proof"
    )
    folder = parser.parse_args(argv).folder
    try:
        runs = read_runs(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = aggregate(runs)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    save_plot(runs, summary, folder / "arms.png")
    save_frontier(runs, summary, folder / "frontier.png")
    print_arms(make_console(), summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
