"""Results kept in docs/results: their overrides still compose, their tables can be made again."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from hydra import compose, initialize_config_dir

from mtp.cli.hydra import register_configs
from mtp.config import to_run_config
from mtp.reports.comparison import aggregate, read_runs

RESULTS = ROOT / "docs" / "results"
NO_RUNS = ("channels", "time_to_accuracy")
"""Folders of docs/results that hold the output of mtp.channels.table and of a benchmark."""
STUDIES = sorted(path.name for path in RESULTS.iterdir() if path.name not in NO_RUNS)
"""The folders of docs/results that hold runs."""


def described(study: str) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and run.yaml of each run of a study."""
    found = sorted((RESULTS / study).glob("*/*/run.yaml"))
    return [(path.parent, yaml.safe_load(path.read_text())) for path in found]


@pytest.mark.parametrize("study", STUDIES)
def test_the_summary_of_a_study_is_that_of_its_runs(study):
    kept = json.loads((RESULTS / study / "summary.json").read_text())
    assert aggregate(read_runs(RESULTS / study)) == kept


@pytest.mark.parametrize("study", STUDIES)
def test_the_overrides_of_a_kept_run_compose_to_a_run_of_its_name(study):
    seen = set()
    for folder, run in described(study):
        summary = json.loads((folder / "summary.json").read_text())
        assert run["seed"] == summary["seed"] == int(folder.name)
        assert Path(run["name"]).parts[-2:] == folder.parts[-2:]
        if tuple(run["overrides"]) in seen:
            continue
        seen.add(tuple(run["overrides"]))
        given = [f"name={run['name']}", f"seed={run['seed']}", *run["overrides"]]
        register_configs()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            made = to_run_config(compose("train", given))
        assert list(made.active_stages()) == [stage["name"] for stage in summary["stages"]]
    assert seen, "a study holds runs"
