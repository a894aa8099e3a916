"""`mtp sweep`: the jobs of a sweep while it runs, and its table."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..reports.sweep_status import Status


def add_sweep(commands: Any) -> None:
    """Add the command to those of `mtp`."""
    text = "show the jobs of a sweep, or its table"
    sub = commands.add_parser("sweep", help=text, description=f"{text}.")
    actions = sub.add_subparsers(required=True, metavar="ACTION")
    for name, run, about in (
        ("status", status, "state, step and last accuracies of each job"),
        ("table", table, "metrics of the finished jobs, with means over seeds; also written to "
         "sweep.csv and sweep.json"),
    ):  # fmt: skip
        action = actions.add_parser(name, help=about, description=f"{about}.")
        action.set_defaults(run=run)
        action.add_argument(
            "folder", type=Path, metavar="DIR", help="a sweep's folder, such as runs/default_sweep"
        )
        if name == "status":
            action.add_argument("--json", action="store_true", help="print a JSON list")


def status(arguments: argparse.Namespace) -> int:
    """`mtp sweep status`; the exit code is 1 if a job failed."""
    import json
    from dataclasses import asdict

    from ..reports.progress import make_console
    from ..reports.sweep_status import print_status, read_status

    not_started = jobs_to_start(arguments.folder)
    jobs: list[Status] = []
    try:
        jobs = read_status(arguments.folder)
    except ValueError:  # it holds no jobs
        if not not_started:
            raise
    begun = [job.overrides for job in jobs]
    jobs += [job for job in not_started if job.overrides not in begun]
    if arguments.json:
        print(json.dumps([asdict(job) for job in jobs], indent=2))
    else:
        print_status(make_console(), arguments.folder, jobs)
    return int(any(job.state == "failed" for job in jobs))


def jobs_to_start(folder: Path) -> "list[Status]":
    """The jobs of a sweep's last command as jobs that have not started."""
    if not (folder / "multirun.yaml").is_file():
        return []
    from ..reports.sweep_status import Status
    from .hydra import jobs_of_command

    return [
        Status(folder=name, overrides=overrides, state="not started", metrics={})
        for name, overrides in jobs_of_command(folder / "multirun.yaml")
    ]


def table(arguments: argparse.Namespace) -> int:
    """`mtp sweep table`; the exit code is 1 if a job failed."""
    from ..reports.sweep import report

    return int(report(arguments.folder) > 0)
