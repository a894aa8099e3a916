"""A dry run: a few steps of each stage, and an estimate of the whole run's cost."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..reports.json_lines import read_records
from ..reports.loggers import FilesConfig

DRY_STEPS = 3
"""Steps of each stage in a dry run."""


def dry_config(config: RunConfig) -> RunConfig:
    """The same run with DRY_STEPS steps per stage and small evaluations, logged to files only."""
    config = deepcopy(config)
    config.logger.sinks = {"files": FilesConfig()}
    for stage in config.active_stages().values():
        stage.steps = min(DRY_STEPS, stage.steps)
    config.evaluation.num_problems = min(8, config.evaluation.num_problems)
    config.overwrite, config.resume = True, False
    return config


def estimate(full_steps: dict[str, int], summary: dict[str, Any], log: Path) -> str:
    """Estimated cost of a full run, from the few steps of each stage that a dry run took.

    The first steps of a stage include compilation, for one shape and then for any shape. All other
    steps are assumed to take as long as the last one in the `log`.
    """
    steps = {r["stage"]: r["step_time"] for r in read_records(log) if "step_time" in r}
    minutes = {}
    for stage in summary["stages"]:
        name = stage["name"]
        left = max(0, full_steps[name] - DRY_STEPS)
        minutes[name] = (stage["seconds"] + steps[name] * left) / 60
    parts = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    return (
        f"a full run would take about {sum(minutes.values()):.0f} min and its evaluations ({parts})"
    )
