"""A comparison of variants: means of each variant's metrics over seeds, with their intervals.

`python -m mtp.reports.comparison FOLDER` prints the table over the variants of a comparison, such
as runs/rl_proof, and writes its summary.json, variants.png and frontier.png.

A run's name gives its variant: `rl_proof/executed_open/3` is seed 3 of variant `executed_open`. The
other variants begin with the models of variant `start`. Metrics are those of the last stage, but
seconds are those of all stages.

A run that was kept without its weights (docs/results, `mtp.reports.keep`) may have a `run.yaml` in
place of its config: name and seed, and the overrides that reproduce it.

Left out: tests between variants, and an interval if only one seed has ended.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..common.process import run_command
from .interval import mean_interval
from .json_lines import read_records, with_plain_names
from .metrics import METRICS, Metric, measured, metrics_of
from .metrics import Table as TableName
from .progress import make_console
from .style import legend, log_axis, looks, panels, save, share_axis

START = "start"
"""Variant whose models the others begin with."""
DESCRIPTIONS = ("config.yaml", "run.yaml")
"""Files with the name and seed of a run: of one in `runs`, of one in `docs/results`."""
ON_DISK = "arms"
"""Key of the variants in `summary.json`."""


@dataclass(frozen=True)
class VariantRun:
    """A run that has ended."""

    variant: str
    seed: int
    metrics: dict[str, Any]
    """Metrics of its last stage; seconds of all stages."""
    curve: list[tuple[int, float]]
    """(step, fast accuracy) of its last stage's evaluations."""
    folder: Path


def read_runs(folder: Path) -> list[VariantRun]:
    """All runs that have ended below a folder.

    Raises ValueError if there are none, or if two are of one variant and seed.
    """
    found: dict[tuple[str, int], Path] = {}
    runs = []
    for path in sorted(folder.rglob("summary.json")):
        home = path.parent
        described = next((home / name for name in DESCRIPTIONS if (home / name).is_file()), None)
        if described is None:
            continue
        description = yaml.safe_load(described.read_text())
        parts = PurePosixPath(description["name"]).parts
        if len(parts) < 2:
            continue
        key = parts[-2], int(description["seed"])
        if key in found:
            raise ValueError(
                f"{home} and {found[key]} are both seed {key[1]} of {key[0]}; keep one of them"
            )
        found[key] = home
        stages = json.loads(path.read_text())["stages"]
        last = dict(stages[-1])
        if "seconds" in last:
            last["seconds"] = sum(stage["seconds"] for stage in stages)
        log = home / "metrics.jsonl"
        curve = [
            (record["step"], record["eval/fast_accuracy"])
            for record in map(with_plain_names, read_records(log) if log.is_file() else [])
            if record["stage"] == last["name"] and record.get("eval/fast_accuracy") is not None
        ]
        runs.append(VariantRun(*key, last, curve, home))
    if not runs:
        raise ValueError(
            f"{folder} holds no run of a variant that has ended; give the folder of a comparison, "
            "such as runs/rl_proof, whose runs are named COMPARISON/VARIANT/SEED"
        )
    return runs


def aggregate(runs: list[VariantRun]) -> dict[str, Any]:
    """Content of a comparison's `summary.json`, the metrics of each variant by name.

    A metric is its mean, or a dict if its interval is shown, see `_interval`.
    """
    starts = {run.seed: run.metrics for run in runs if run.variant == START}
    with_interval = metrics_of("interval")
    known = {name for run in runs for name, value in run.metrics.items() if value is not None}
    variants: dict[str, Any] = {}
    for variant in dict.fromkeys(run.variant for run in runs if run.variant != START):
        mine = sorted((run for run in runs if run.variant == variant), key=lambda run: run.seed)
        variants[variant] = {"seeds": [run.seed for run in mine]}
        for name in ("slow_accuracy", "fast_accuracy"):
            began = [starts.get(run.seed, {}).get(name) for run in mine]
            variants[variant][f"start_{name}"] = _mean(began)
        for metric in METRICS.values():
            if metric.name not in known:
                continue
            values = [run.metrics.get(metric.name) for run in mine]
            variants[variant][metric.name] = (
                _interval(values, metric) if metric in with_interval else _mean(values)
            )
    return {ON_DISK: variants}


def _mean(values: list[Any]) -> Any:
    """The mean, of a list entry by entry; None if a run lacks the metric."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    if isinstance(known[0], list):
        return [sum(column) / len(column) for column in zip(*known, strict=True)]
    return sum(known) / len(known)


def _interval(values: list[float | None], metric: Metric) -> dict[str, float | None]:
    """Mean and the ends of its interval; no ends for a single run."""
    if len(values) < 2:
        return {"mean": values[0], "low": None, "high": None}
    found = mean_interval(values, metric.bounds)
    if found is None:
        return {"mean": None, "low": None, "high": None}
    return {"mean": found.center, "low": found.low, "high": found.high}


def mean_of(value: Any) -> float | None:
    """The mean of a metric as `aggregate` gives it."""
    return value["mean"] if isinstance(value, dict) else value


def shown_metrics(summary: dict[str, Any], table: TableName) -> list[Metric]:
    """Metrics of a table that some variant has a mean of."""
    means = [{k: mean_of(v) for k, v in one.items()} for one in summary[ON_DISK].values()]
    return measured(table, means)


def save_plot(runs: list[VariantRun], summary: dict[str, Any], path: Path) -> None:
    """Fast accuracy over steps, one line per variant, and each variant's means with their
    intervals.
    """
    variants = summary[ON_DISK]
    series = [looks(number) for number in range(len(variants))]
    figure, [[left, right]] = panels(1, 2)
    for variant, look in zip(variants, series, strict=True):
        curves = [dict(run.curve) for run in runs if run.variant == variant and run.curve]
        for curve in curves:
            left.plot(list(curve), list(curve.values()), **look | {"alpha": 0.2, "linewidth": 1})
        shared = sorted(set.intersection(*map(set, curves))) if curves else []
        means = [sum(curve[step] for curve in curves) / len(curves) for step in shared]
        left.plot(shared, means, label=variant, **look)
    left.set_xlabel("optimizer steps of RL")
    share_axis(left, "held-out fast accuracy")
    metrics = [metric for metric in shown_metrics(summary, "interval") if metric.unit == "%"]
    for i, metric in enumerate(metrics):
        for row, (variant, look) in enumerate(zip(variants, series, strict=True)):
            value = variants[variant][metric.name]
            at = row + 0.2 * (i - (len(metrics) - 1) / 2)
            marker = look | {"marker": "soD^v"[i % 5], "linestyle": "none"}
            label = metric.label if row == 0 else None
            if value["mean"] is not None:
                right.plot(value["mean"], at, label=label, **marker)
            if value["low"] is not None:
                right.plot([value["low"], value["high"]], [at, at], color=look["color"])
    right.set(yticks=range(len(variants)), yticklabels=variants)
    right.invert_yaxis()
    share_axis(right, "mean over seeds and its 95 % interval", "x")
    for axes in (left, right):
        legend(axes)
    save(figure, path)


def save_frontier(runs: list[VariantRun], summary: dict[str, Any], path: Path) -> None:
    """Fast accuracy over legibility: each run, and the mean of each variant.

    One panel for each metric of the frontier that all runs have; no plot if there is none.
    """
    variants = summary[ON_DISK]
    fast = {variant: mean_of(means.get("fast_accuracy")) for variant, means in variants.items()}
    metrics = [
        metric
        for metric in shown_metrics(summary, "frontier")
        if all(mean_of(means[metric.name]) is not None for means in variants.values())
    ]
    if not metrics or None in fast.values():
        return
    figure, [row] = panels(1, len(metrics))
    for axes, metric in zip(row, metrics, strict=True):
        for i, (variant, means) in enumerate(variants.items()):
            look = looks(i) | {"linestyle": "none"}
            mine = [run.metrics for run in runs if run.variant == variant]
            points = [(one[metric.name], one["fast_accuracy"]) for one in mine]
            axes.plot(*zip(*points, strict=True), marker=".", **look | {"alpha": 0.4})
            mean = mean_of(means[metric.name])
            of_mean = look | {"marker": "o", "markersize": 6, "label": variant}
            axes.plot(mean, fast[variant], **of_mean)
        share_axis(axes, "held-out fast accuracy")
        if metric.unit == "%":
            share_axis(axes, f"{metric.label}, fast mode", "x")
        else:
            log_axis(axes, f"{metric.label}, fast mode", metric.unit, "x")
    legend(row[0])
    save(figure, path)


def print_variants(console: Console, summary: dict[str, Any]) -> None:
    """One row per variant."""
    title = "held-out metrics by variant: means over seeds, 95 % intervals (Student's t)"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("variant", no_wrap=True)
    metrics = shown_metrics(summary, "comparison")
    at_start = [METRICS[name] for name in ("slow_accuracy", "fast_accuracy")]
    heads = [f"{metric.title}\nat start" for metric in at_start]
    for head in ("seeds", *heads, *(metric.narrow_head for metric in metrics)):
        table.add_column(head, justify="right")
    for variant, means in summary[ON_DISK].items():
        cells = [metric.cell(means[f"start_{metric.name}"]) for metric in at_start]
        cells += [variant_cell(metric, means.get(metric.name)) for metric in metrics]
        table.add_row(escape(variant), str(len(means["seeds"])), *cells)
    console.print(table)


def variant_cell(metric: Metric, value: Any) -> str:
    """A mean as the table shows it; its interval, if it has one, in a line below."""
    if not isinstance(value, dict) or value["low"] is None:
        return metric.cell(mean_of(value))
    # One digit less than the mean, or the columns would be too wide for 120 characters.
    digits, scale = max(metric.digits - 1, 0), 100 if metric.unit == "%" else 1
    ends = (f"{scale * value[end]:.{digits}f}" for end in ("low", "high"))
    return f"{metric.cell(value['mean'])}\n{'–'.join(ends)}"


def main(argv: list[str] | None = None) -> int:
    """Print the table over a comparison's variants; the exit code is 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m mtp.reports.comparison",
        description="Print the table over the variants of a comparison; write summary.json, "
        "variants.png and frontier.png (fast accuracy against legibility) beside them.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="of a comparison, such as runs/rl_proof"
    )
    folder = parser.parse_args(argv).folder
    return run_command(lambda: write_report(folder))


def write_report(folder: Path) -> None:
    """Print the table of a comparison and write its summary and plots into its folder.

    Raises ValueError as `read_runs` does.
    """
    runs = read_runs(folder)
    summary = aggregate(runs)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    save_plot(runs, summary, folder / "variants.png")
    save_frontier(runs, summary, folder / "frontier.png")
    print_variants(make_console(), summary)


if __name__ == "__main__":
    sys.exit(main())
