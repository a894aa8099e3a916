"""`mtp report`: the report page of one or several runs, also of runs that have not ended."""

import argparse
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_LOOKS = 2.0
"""Seconds after which `--watch` looks for new records."""
WATCHED = ("metrics.jsonl", "summary.json", "outcomes.jsonl", "thoughts.jsonl", "job.json")


def add_report(commands: Any) -> None:
    """Add the command to those of `mtp`."""
    text = "write a page about runs: metrics, plots and thoughts in one HTML file"
    sub = commands.add_parser("report", help=text, description=text)
    sub.set_defaults(run=report)
    sub.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run's folder, such as runs/default, or one with several runs, such as a sweep's",
    )
    sub.add_argument("--open", action="store_true", help="show the page in a browser")
    sub.add_argument(
        "--watch",
        action="store_true",
        help="write it again until the runs have ended; the page reloads",
    )
    sub.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: report.html in the folder, or in the working folder for several folders",
    )


def report(arguments: argparse.Namespace) -> None:
    """`mtp report`."""
    from ..reports.page import REPORT, find_runs, write_page

    folders: list[Path] = arguments.folders
    output = arguments.output
    if output is None:
        output = folders[0] / REPORT if len(folders) == 1 else Path(REPORT)
    if output.is_dir():
        raise ValueError(f"--output must be a file, got the folder {output}; add a file's name")
    runs = find_runs(folders)
    has_ended = write_page(folders, output, watch=arguments.watch)
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB, {len(runs)} runs)")
    if arguments.open and not webbrowser.open(output.resolve().as_uri()):
        print(f"no browser could be started; open {output.resolve()}", file=sys.stderr)
    if not arguments.watch or has_ended:
        return
    print("watching; Ctrl-C ends it")
    try:
        watch(folders, output)
    except KeyboardInterrupt:
        print(f"{output} is as of now")


def watch(folders: list[Path], output: Path) -> None:
    """Write the page again after each change, until all runs have ended."""
    from ..reports.page import find_runs, write_page

    before = None
    has_ended = False
    while not has_ended:
        now = changed_at(find_runs(folders))
        if now != before:
            has_ended = write_page(folders, output, watch=True)
            before = now
        if not has_ended:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    print(f"all runs have ended; {output} is complete")


def changed_at(runs: list[Path]) -> dict[Path, tuple[int, int]]:
    """Time of change and size of the files that the page is made of."""
    found = {}
    for path in (run / name for run in runs for name in WATCHED):
        if path.is_file():
            found[path] = path.stat().st_mtime_ns, path.stat().st_size
    return found
