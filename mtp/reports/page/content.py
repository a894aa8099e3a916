"""Content of the page as plain data: tables, points, curves, slots, pairs, rollouts.

The scripts of the page draw it and compute nothing but the order of rows.
"""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import PurePosixPath
from typing import Any

from ..interval import mean_interval, paired_comparison, share_interval
from ..measures import CURVES, TABLES, by_slot
from ..metrics import METRICS, Metric, measured
from .charts import CHARTS, curve_names
from .runs import Run
from .slots import slot_means

MAX_POINTS = 2000
"""Points of a curve over training on the whole page: more are averaged."""
MAX_ROLLOUTS = 4000
"""Rollouts on the whole page."""
MAX_SETTINGS = 6
"""Settings that a table of runs and the name of a group show at most, besides the seed."""
MAX_PAIRED = 40
"""Evaluations that are compared pair by pair; of more, each with the first one only."""
MODES = ("slow", "fast", "verified")


@dataclass
class Page:
    """Data of a page, and the rollouts that it opens one at a time."""

    data: dict[str, Any]
    rollouts: list[dict[str, Any]]


def page_data(runs: list[Run], title: str) -> Page:
    """Everything that the page shows."""
    rollouts = kept_rollouts(runs)
    names = group_names(runs)
    data = {
        "title": title,
        "runs": [
            {
                "name": run.name,
                "status": run.status,
                "error": run.error,
                "overrides": shown_settings(run),
                "seed": run.settings.get("seed"),
                "stages": stage_rows(run),
                "curves": curves(run, MAX_POINTS // len(runs)),
                "points": evaluation_points(run),
                "finals": final_points(run),
                "group": names[number],
                "times": step_times(run),
                "measures": run.measures,
                "slots": slot_means([r for r in rollouts if r["run"] == number], stage_rows(run)),
            }
            for number, run in enumerate(runs)
        ],
        "metrics": as_rows(measured("run", [row for run in runs for row in stage_rows(run)])),
        "measures": measure_metrics([result for run in runs for result in run.measures]),
        "measure_curves": [asdict(curve) for curve in CURVES],
        "groups": seed_groups(runs, names),
        "pairs": pairs(runs),
        "charts": [asdict(chart) for chart in CHARTS],
        "rollouts": [index_row(rollout) for rollout in rollouts],
    }
    return Page(data, rollouts)


def as_rows(metrics: list[Metric]) -> list[dict[str, Any]]:
    """Metrics as the page's tables take them."""
    return [asdict(metric) | {"head": metric.head} for metric in metrics]


def measure_metrics(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each measure that has results, the metrics of its table, and those by slot."""
    found = []
    for measure, table in TABLES.items():
        mine = [result for result in results if result["measure"] == measure]
        if mine:
            slots = {metric.name: metric for result in mine for metric in by_slot(result)}
            about = {"measure": measure, "metrics": as_rows(measured(table, mine))}
            found.append(about | {"by_slot": as_rows(list(slots.values()))})
    return found


def stage_rows(run: Run) -> list[dict[str, Any]]:
    """A row a stage: its metrics, with intervals of the accuracies under `intervals`.

    A stage that has not ended has the metrics of its last evaluation. Wilson's interval takes
    problems that are independent, so there is none where they are those of projects.
    """
    rows: dict[str, dict[str, Any]] = {}
    for record in run.records:
        metrics = evaluated(record)
        if metrics:
            about = {"name": record["stage"], "steps": record["step"], "ended": False}
            rows[record["stage"]] = about | metrics
    for stage in (run.summary or {}).get("stages", []):
        rows[stage["name"]] = stage | {"ended": True}
    for row in rows.values():
        row["intervals"] = {}
        for mode in MODES:
            share, number = row.get(f"{mode}_accuracy"), row.get("num_problems")
            if share is not None and number and not has_projects(row):
                found = share_interval(round(share * number), number)
                row["intervals"][f"{mode}_accuracy"] = [found.low, found.high]
    return list(rows.values())


def has_projects(metrics: dict[str, Any]) -> bool:
    """True if the problems of an evaluation are those of projects, by its metrics."""
    return any(name.endswith("_by_place") for name in metrics)


def evaluated(record: dict[str, Any]) -> dict[str, Any]:
    """Metrics of an evaluation's record by name; empty for a record of training."""
    return {k.removeprefix("eval/"): v for k, v in record.items() if k.startswith("eval/")}


def evaluation_points(run: Run) -> list[dict[str, Any]]:
    """Accuracy of each evaluation and mode, with Wilson's interval where it is known."""
    numbers = {
        (row["global_step"], row["stage"], row["mode"]): len(row["right"]) for row in run.outcomes
    }
    ended = {s["name"]: s.get("num_problems") for s in (run.summary or {}).get("stages", [])}
    points: dict[tuple[Any, ...], dict[str, Any]] = {}
    last = {record["stage"]: record["global_step"] for record in run.records}
    for record in run.records:
        metrics = evaluated(record)
        for mode in MODES:
            share = metrics.get(f"{mode}_accuracy")
            if share is None:
                continue
            step, stage = record["global_step"], record["stage"]
            number = numbers.get((step, stage, mode))
            if number is None and step == last[stage]:
                number = ended.get(stage)
            found = None
            if number and not has_projects(metrics):
                found = share_interval(round(share * number), number)
            points[stage, step, mode] = {
                "stage": stage,
                "step": step,
                "mode": mode,
                "accuracy": share,
                "low": found and found.low,
                "high": found and found.high,
            }
    return list(points.values())


def final_points(run: Run) -> list[dict[str, Any]]:
    """Accuracy and passes of each stage and mode where both are known."""
    points = []
    for row in stage_rows(run):
        for mode in MODES:
            # Verified mode has the text of slow mode, in fewer passes.
            name = "slow_accuracy" if mode == "verified" else f"{mode}_accuracy"
            share, passes = row.get(name), row.get(f"{mode}_passes")
            if share is not None and passes:
                low, high = row["intervals"].get(name, (None, None))
                about = {"stage": row["name"], "mode": mode, "accuracy": share, "passes": passes}
                points.append(about | {"low": low, "high": high})
    return points


def curves(run: Run, max_points: int) -> dict[str, list[list[Any]]]:
    """Values over global steps by metric: [steps, means] of equal groups of records."""
    found: dict[str, list[list[Any]]] = {}
    for name in curve_names(run.records):
        pairs = [
            (record["global_step"], record[name])
            for record in run.records
            if isinstance(record.get(name), int | float) and math.isfinite(record[name])
        ]
        size = math.ceil(len(pairs) / max(50, max_points))
        groups = [pairs[at : at + size] for at in range(0, len(pairs), max(1, size))]
        if groups:
            found[name] = [
                [group[-1][0] for group in groups],
                [_short(sum(value for _, value in group) / len(group)) for group in groups],
            ]
    return found


def _short(value: float) -> float:
    """Five digits, which is more than a plot shows."""
    return float(f"{value:.5g}")


def step_times(run: Run) -> list[dict[str, Any]]:
    """Mean seconds of a step's sampling and of the rest, by stage."""
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in run.records:
        if "step_time" in record:
            sampling = record.get("rollout_time", 0.0)
            times[record["stage"]].append((sampling, record["step_time"] - sampling))
    return [
        {
            "stage": stage,
            "sampling": sum(one for one, _ in rows) / len(rows),
            "update": sum(two for _, two in rows) / len(rows),
        }
        for stage, rows in times.items()
    ]


def shown_settings(run: Run) -> dict[str, str]:
    """The first settings in which a run differs from the others, and its seed."""
    others = {key: value for key, value in run.overrides.items() if key != "seed"}
    return dict(list(others.items())[:MAX_SETTINGS]) | {
        key: value for key, value in run.overrides.items() if key == "seed"
    }


def group_names(runs: list[Run]) -> list[str]:
    """For each run the name of its group: the runs that differ from it by seed alone."""
    names: dict[tuple[str, ...], str] = {}
    found = []
    for run in runs:
        shared = [f"{key}={value}" for key, value in run.overrides.items() if key != "seed"]
        variant = PurePosixPath(run.name).parent.as_posix()
        words = shared if variant == "." else [variant, *shared]
        if (key := tuple(words)) not in names:
            shown = words[: MAX_SETTINGS + 1]
            more = len(words) - len(shown)
            name = ", ".join([*shown, *([f"{more} more"] if more else [])]) or "all seeds"
            alike = sum(one == name or one.startswith(f"{name} (") for one in names.values())
            names[key] = f"{name} ({alike + 1})" if alike else name
        found.append(names[key])
    return found


def seed_groups(runs: list[Run], names: list[str]) -> list[dict[str, Any]]:
    """Runs that have ended and differ by seed alone: mean and interval of each metric.

    Of runs with the same seed the last one counts. names: those of the runs' groups.
    """
    members: dict[tuple[str, str], dict[str, tuple[Run, dict[str, Any]]]] = defaultdict(dict)
    for run, name in zip(runs, names, strict=True):
        rows = stage_rows(run)
        if run.status == "ended" and rows and "seed" in run.overrides:
            members[name, rows[-1]["name"]][run.overrides["seed"]] = (run, rows[-1])
    groups = []
    for (name, stage), by_seed in members.items():
        found = list(by_seed.values())
        if len(found) < 2:
            continue
        metrics = {}
        for metric in METRICS.values():
            values = [row.get(metric.name) for _, row in found]
            if all(isinstance(value, int | float) for value in values):
                interval = mean_interval(values, metric.bounds)
                metrics[metric.name] = interval and [interval.center, interval.low, interval.high]
        seeds = [run.overrides["seed"] for run, _ in found]
        groups.append({"name": name, "stage": stage, "seeds": seeds, "metrics": metrics})
    return groups


def pairs(runs: list[Run]) -> list[dict[str, Any]]:
    """Comparisons of two evaluations on the same problems: the last ones of each run and mode.

    Of a single run, the evaluations that ended its stages. Two differ in one thing: the run, the
    stage or the mode. The problems of projects are not independent, as the intervals and the test
    need them, so their evaluations are left out.
    """
    entries = []
    for number, run in enumerate(runs):
        single = [row for row in run.outcomes if row.get("project_size", 1) == 1]
        ended = [row for row in single if row.get("ends_stage")]
        if len(runs) > 1 and ended:
            ended = [row for row in ended if row["stage"] == ended[-1]["stage"]]
        # Verified mode has the text of slow mode.
        latest = {(row["stage"], row["mode"]): row for row in ended if row["mode"] != "verified"}
        for (stage, mode), row in latest.items():
            entries.append((number, stage, mode, row))
    chosen = list(combinations(entries, 2))
    if len(entries) > MAX_PAIRED:
        chosen = [(entries[0], other) for other in entries[1:]]
    found = []
    for one, two in chosen:
        num_differing = sum(a != b for a, b in zip(one[:3], two[:3], strict=True))
        same_problems = one[3]["problems"] == two[3]["problems"]
        if same_problems and (num_differing == 1 or one[0] != two[0] and one[2] == two[2]):
            result = asdict(paired_comparison(one[3]["right"], two[3]["right"]))
            found.append({"first": one[:3], "second": two[:3], **result})
    return found


def kept_rollouts(runs: list[Run]) -> list[dict[str, Any]]:
    """Rollouts of all runs, each run's share of the limit; those that end a stage come first."""
    kept: list[dict[str, Any]] = []
    limit = MAX_ROLLOUTS // len(runs)
    for number, run in enumerate(runs):
        rollouts = list(run.thoughts())
        final = [row for row in rollouts if row.get("ends_stage")]
        interim = [row for row in rollouts if not row.get("ends_stage")]
        chosen = final
        if len(final) > limit:
            # As many of each evaluation, whose records begin with the shared and the wrong ones.
            by_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
            for row in final:
                by_step[row["global_step"]].append(row)
            chosen = [row for rows in by_step.values() for row in rows[: limit // len(by_step)]]
        chosen = chosen + interim[: max(0, limit - len(chosen))]
        kept += [{"run": number, **row} for row in chosen]
    return kept


def index_row(rollout: dict[str, Any]) -> dict[str, Any]:
    """One rollout as the list shows it."""
    names = ("run", "stage", "global_step", "ends_stage", "mode", "problem", "right")
    false_steps = sum(not step[2] for step in rollout["steps"])
    return {
        **{name: rollout[name] for name in names},
        "prompt": rollout["prompt"][-160:],
        "passes": len(rollout["passes"]),
        "tokens": len(rollout["tokens"]),
        "false_steps": false_steps,
        "steps": len(rollout["steps"]),
    }
