"""Results of a comparison, kept without weights: `python -m mtp.reports.keep RUNS RESULTS`.

Copies each run that has ended below RUNS, such as runs/imperfect_teacher, into
RESULTS/VARIANT/SEED: its `summary.json`, the accuracies of its evaluations in `metrics.jsonl`, and
a `run.yaml` with the overrides of conf/ that make it again. Of a run that was not a sweep's job
nothing lists its overrides, so its whole `config.yaml` is copied in place of that. Then it writes
the comparison's own summary and plots, as `python -m mtp.reports.comparison RESULTS` does.

Left out: weights, and metrics of training steps.
"""

import argparse
import json
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ..common.errors import read_json
from ..common.files import save_text
from ..common.process import run_command
from .comparison import VariantRun, read_runs, write_report
from .json_lines import read_records, with_plain_names

EVALUATED = ("eval/slow_accuracy", "eval/fast_accuracy", "eval/true_steps")
"""Metrics of a kept evaluation."""


def keep(run: VariantRun, results: Path) -> None:
    """Write what is kept of a run. Raises ValueError if its config is gone."""
    described = run.folder / "config.yaml"
    if not described.is_file():
        raise ValueError(
            f"{run.folder} must be a run's folder with its config.yaml; give the folder of a "
            "comparison in runs"
        )
    config = yaml.safe_load(described.read_text())
    home = results / run.variant / str(run.seed)
    home.mkdir(parents=True, exist_ok=True)
    save_text(home / "summary.json", (run.folder / "summary.json").read_text())
    lines = [json.dumps(record) + "\n" for record in evaluations(run.folder / "metrics.jsonl")]
    save_text(home / "metrics.jsonl", "".join(lines))
    overrides = overrides_of(run, config)
    if overrides is None:
        save_text(home / described.name, described.read_text())
        return
    content = {"name": config["name"], "seed": run.seed, "overrides": overrides}
    save_text(home / "run.yaml", yaml.safe_dump(content, sort_keys=False))


def evaluations(log: Path) -> list[dict[str, Any]]:
    """Records of evaluations, with the metrics that are kept."""
    names = ("stage", "step", "global_step", *EVALUATED)
    return [
        {name: record[name] for name in names if record.get(name) is not None}
        for record in map(with_plain_names, read_records(log))
        if any(record.get(name) is not None for name in EVALUATED)
    ]


def overrides_of(run: VariantRun, config: dict[str, Any]) -> list[str] | None:
    """Overrides that make a run again, but for its seed; None for one that was no sweep's job.

    Those of its job, with the ones that all jobs shared where `job.json` has them; its experiment
    is COMPARISON/VARIANT where the job names none.
    """
    path = run.folder / "job.json"
    if not path.is_file():
        return None
    noted = read_json(path)
    overrides = dict(noted.get("settings", noted["overrides"]))
    overrides.pop("seed", None)
    experiment = PurePosixPath(config["name"]).parent.as_posix()
    overrides = {"experiment": experiment} | overrides
    return [f"{key}={value}" for key, value in overrides.items()]


def main(argv: list[str] | None = None) -> int:
    """Keep all runs that have ended, and print the table over them."""
    parser = argparse.ArgumentParser(
        prog="python -m mtp.reports.keep",
        description="Copy summaries and evaluations of a comparison's finished runs, without "
        "weights; write its summary and plots beside them.",
    )
    parser.add_argument("runs", type=Path, metavar="RUNS", help="such as runs/imperfect_teacher")
    parser.add_argument(
        "results", type=Path, metavar="RESULTS", help="such as docs/results/imperfect_teacher"
    )
    arguments = parser.parse_args(argv)

    def command() -> None:
        for run in read_runs(arguments.runs):
            keep(run, arguments.results)
        write_report(arguments.results)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
