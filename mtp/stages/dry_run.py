"""A dry run: a few steps of each stage, and an estimate of the whole run's cost."""

import statistics
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..reports.json_lines import read_records
from ..reports.loggers import FilesConfig

WARM_UP = 3
"""First steps of a stage, which include compilation, for one shape and then for any shape."""
DRY_STEPS = WARM_UP + 3
"""Steps of each stage in a dry run."""


def dry_config(config: RunConfig) -> RunConfig:
    """The same run with DRY_STEPS steps per stage and small evaluations, logged to files only."""
    config = deepcopy(config)
    config.logger.sinks = {"files": FilesConfig()}
    config.logger.log_every = 1
    for stage in config.active_stages().values():
        stage.steps = min(DRY_STEPS, stage.steps)
    projects = getattr(config.task, "project_size", 1)
    config.evaluation.num_problems = min(8 * projects, config.evaluation.num_problems)
    config.overwrite, config.resume = True, False
    return config


def estimate(full_steps: dict[str, int], summary: dict[str, Any], log: Path) -> str:
    """Estimated cost of a full run, from the steps of each stage that a dry run took.

    Steps that were not taken count as the median of those after the warm-up. Rollouts of a model
    that was hardly trained are longer than later ones, so the estimate of an RL stage is high.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    for record in read_records(log):
        if "step_time" in record:
            seconds[record["stage"]].append(record["step_time"])
    minutes = {}
    for stage in summary["stages"]:
        name, taken = stage["name"], seconds[stage["name"]]
        left = max(0, full_steps[name] - len(taken))
        minutes[name] = (sum(taken) + left * statistics.median(taken[WARM_UP:] or taken)) / 60
    parts = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    return (
        f"a full run would take about {sum(minutes.values()):.0f} min and its evaluations ({parts})"
    )
