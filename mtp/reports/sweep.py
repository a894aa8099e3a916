"""A sweep: the state of each job, and the table over them. `python -m mtp.reports.sweep FOLDER`.

A job writes its overrides, and its error if it fails, to `job.json` of its folder; its metrics are
those of the last stage in `summary.json`. Jobs that differ by `seed` alone are a group, with the
mean of each metric and its 95 % interval by Student's t (`interval.py`). A folder may hold the jobs
of several commands: overrides that the jobs of one share, and others lack, distinguish them too.

Left out: tests between groups, and an interval if only one job has ended.
"""

import argparse
import csv
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..common.errors import read_json
from ..common.files import is_hidden, save_text
from ..common.process import run_command
from .interval import mean_interval
from .metrics import METRICS, Metric, measured, metrics_of
from .progress import make_console


@dataclass(kw_only=True)
class Job:
    """One row of the table."""

    folder: str
    """Name of the job within the sweep's folder."""
    overrides: dict[str, str]
    """Overrides that distinguish it from the other jobs of the folder."""
    swept: dict[str, str]
    """Overrides that distinguish it from the other jobs of its command."""
    settings: dict[str, str] | None = None
    """All of its overrides that decide its numbers; None if an earlier version ran it."""
    status: str
    """done, failed or unfinished (running, queued, interrupted or killed)."""
    error: str | None = None
    """First line of its error, if it failed."""
    stage: str | None = None
    """Last stage, if it is done."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Metrics of the last stage by name, with the seconds of the whole run; empty unless it is
    done."""


@dataclass(kw_only=True)
class Group:
    """Completed jobs that differ by seed alone."""

    overrides: dict[str, str]
    """Overrides of all its jobs, without the seed."""
    seeds: list[str]
    mean: dict[str, float | None]
    """Mean by metric; None, like its interval, if some job lacks the metric."""
    low: dict[str, float | None]
    """Lower end of the 95 % interval of the mean."""
    high: dict[str, float | None]
    """Upper end."""


def read_jobs(folder: Path) -> list[Job]:
    """The jobs of a sweep, and any run in its folder; numbers in names are sorted as numbers.

    Raises ValueError if there are none.
    """
    found = {path.parent for name in ("job.json", "summary.json") for path in folder.rglob(name)}
    names = [path.relative_to(folder) for path in found - {folder}]
    names = [name for name in names if not is_hidden(name)]
    jobs = [read_job(folder / name, str(name)) for name in sorted(names, key=_sorting_key)]
    if not jobs:
        raise ValueError(
            f"{folder} holds no jobs; give the folder of a sweep, such as runs/default_sweep"
        )
    known = [job.settings.items() for job in jobs if job.settings is not None]
    for job in jobs:
        for key, value in (job.settings or {}).items():
            if not all((key, value) in settings for settings in known):
                job.overrides.setdefault(key, value)
    return jobs


def _sorting_key(path: Path) -> list[tuple[float, str]]:
    """Fields of a folder's path; those that are numbers come first, in order."""
    key = []
    for part in re.split("[=,/]", path.as_posix()):
        try:
            key.append((float(part), ""))
        except ValueError:
            key.append((math.inf, part))
    return key


def read_job(path: Path, name: str) -> Job:
    """One job, from its folder, and its name within the sweep's."""
    noted: dict[str, Any] = {"overrides": {}, "error": None}
    if (path / "job.json").is_file():
        noted = read_json(path / "job.json")
        if not (isinstance(noted, dict) and isinstance(noted.get("overrides"), dict)):
            raise ValueError(f"{path / 'job.json'} is not the record of a job; remove it")
    swept, settings = noted["overrides"], noted.get("settings")
    job = Job(
        folder=name,
        overrides=_bare(swept),
        swept=swept,
        settings=None if settings is None else _bare(settings),
        status="unfinished",
    )
    if noted.get("error") is not None:
        job.status, job.error = "failed", noted["error"]
    elif (path / "summary.json").is_file():
        summary = read_json(path / "summary.json")
        try:
            last = summary["stages"][-1] | {"seconds": summary["seconds"]}
            job.status, job.stage = "done", last["name"]
            job.metrics = {m.name: last[m.name] for m in metrics_of("sweep") if m.name in last}
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{path / 'summary.json'} is not the summary of a run") from None
    return job


def _bare(overrides: dict[str, str]) -> dict[str, str]:
    """Overrides by key alone: + and ++ before it change nothing about the value."""
    return {key.lstrip("+"): value for key, value in overrides.items()}


def group_by_seed(jobs: list[Job]) -> list[Group]:
    """Groups of at least two jobs that are done, in the order of their first job.

    Of jobs with the same seed, those of two sweeps in one folder, the last one counts.
    """
    members: dict[tuple[tuple[str, str], ...], dict[str, Job]] = {}
    for job in jobs:
        if job.status == "done" and "seed" in job.overrides:
            shared = tuple((k, v) for k, v in sorted(job.overrides.items()) if k != "seed")
            members.setdefault(shared, {})[job.overrides["seed"]] = job
    groups = []
    for shared, by_seed in members.items():
        found = list(by_seed.values())
        if len(found) > 1:
            names = dict.fromkeys(name for job in found for name in job.metrics)
            intervals = {
                name: mean_interval([job.metrics.get(name) for job in found], METRICS[name].bounds)
                for name in names
            }
            groups.append(
                Group(
                    overrides=dict(shared),
                    seeds=[job.overrides["seed"] for job in found],
                    mean={name: i.center if i else None for name, i in intervals.items()},
                    low={name: i.low if i else None for name, i in intervals.items()},
                    high={name: i.high if i else None for name, i in intervals.items()},
                )
            )
    return groups


def report(folder: Path, console: Console | None = None) -> int:
    """Print the table, write `sweep.csv` and `sweep.json`; returns the number of failed jobs."""
    jobs = read_jobs(folder)
    groups = group_by_seed(jobs)
    write_csv(folder / "sweep.csv", jobs)
    content = {"jobs": [asdict(job) for job in jobs], "groups": [asdict(g) for g in groups]}
    save_text(folder / "sweep.json", json.dumps(content, indent=2) + "\n")
    print_jobs(console or make_console(), folder, jobs, groups)
    return sum(job.status == "failed" for job in jobs)


def write_csv(path: Path, jobs: list[Job]) -> None:
    """One row per job: its folder, its overrides by key, its status, metrics and error."""
    names = list(dict.fromkeys(name for job in jobs for name in job.metrics))
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["folder", *keys, "status", "stage", *names, "error"])
        writer.writeheader()
        for job in jobs:
            row = {"folder": job.folder, "status": job.status, "stage": job.stage}
            writer.writerow({**row, "error": job.error, **job.overrides, **job.metrics})


def print_jobs(console: Console, folder: Path, jobs: list[Job], groups: list[Group]) -> None:
    """One row per completed job, one row per group, then the jobs that are not done."""
    done = [job for job in jobs if job.status == "done"]
    keys = list(dict.fromkeys(key for job in done for key in job.overrides))
    if done:
        table = Table(title=f"{folder}: {len(done)} of {len(jobs)} jobs done, last stage")
        for key in keys or ["job"]:
            table.add_column(escape(key))
        table.add_column("stage")
        metrics = measured("sweep", [job.metrics for job in done])
        for metric in metrics:
            table.add_column(metric.narrow_head, justify="right")
        for job in done:
            named = [job.overrides.get(key, "") for key in keys] or [job.folder]
            shown = [metric.cell(job.metrics.get(metric.name)) for metric in metrics]
            table.add_row(*map(escape, named), job.stage, *shown)
        if groups:
            table.add_section()
        for group in groups:
            named = [
                f"{len(group.seeds)} seeds" if key == "seed" else group.overrides.get(key, "")
                for key in keys
            ]
            table.add_row(*map(escape, named), "", *(mean_cell(m, group) for m in metrics))
        console.print(table)
        if groups:
            console.print(
                "± or the range in brackets: 95 % interval of the mean over the seeds, "
                "by Student's t, cut at the bounds of the metric"
            )
    for job in jobs:
        if job.status != "done":
            console.print(f"{job.status}: {escape(job.folder)}" + _colon(job.error))


def _colon(text: str | None) -> str:
    return "" if text is None else f": {escape(text)}"


def mean_cell(metric: Metric, group: Group) -> str:
    """Mean and interval as the table shows them."""
    low, high = group.low.get(metric.name), group.high.get(metric.name)
    ends = None if low is None or high is None else (low, high)
    return metric.cell(group.mean.get(metric.name), ends)


def main(argv: list[str] | None = None) -> int:
    """Print a sweep's table; the exit code is 1 if a job failed, 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m mtp.reports.sweep",
        description="Print the table over a sweep's jobs; write sweep.csv and sweep.json beside "
        "them.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="of a sweep, such as runs/default_sweep"
    )
    folder = parser.parse_args(argv).folder
    return run_command(lambda: 1 if report(folder) else 0)


if __name__ == "__main__":
    sys.exit(main())
