"""`mtp sweep`: the jobs of a sweep while it runs, and its table."""

import argparse
from pathlib import Path
from typing import Any


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

    jobs = read_status(arguments.folder)
    if arguments.json:
        print(json.dumps([asdict(job) for job in jobs], indent=2))
    else:
        print_status(make_console(), arguments.folder, jobs)
    return int(any(job.state == "failed" for job in jobs))


def table(arguments: argparse.Namespace) -> int:
    """`mtp sweep table`; the exit code is 1 if a job failed."""
    from ..reports.sweep import report

    return int(report(arguments.folder) > 0)
