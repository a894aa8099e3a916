"""Runs as their folders describe them, ended or not: settings, metrics, kept rollouts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...common.files import is_hidden
from ..json_lines import parse_records, with_plain_names
from ..measures import read_results

DESCRIPTIONS = ("config.yaml", "run.yaml")
"""Files that describe a run: those of `runs/` and those of `docs/results`."""
NOT_COMPARED = (
    "name", "run_dir", "resume", "overwrite", "dry_run", "logger", "fabric", "experiment", "commit",
)  # fmt: skip
"""Settings, and groups of them, that do not say how two runs differ."""
COMPARED = ("fabric.precision",)
"""Settings of these groups that do."""


@dataclass
class Run:
    """One run as the page shows it."""

    folder: Path
    name: str
    settings: dict[str, str]
    """All settings by dotted key, or those that are known."""
    summary: dict[str, Any] | None
    """Content of summary.json; None until the run has ended."""
    records: list[dict[str, Any]]
    """Records of metrics.jsonl."""
    outcomes: list[dict[str, Any]]
    """Records of outcomes.jsonl."""
    error: str | None = None
    """First line of the error of a sweep's job that failed."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Settings in which this run differs from the others of the page, the seed last."""
    measures: list[dict[str, Any]] = field(default_factory=list)
    """Results of `mtp evaluate --measure`."""

    @property
    def status(self) -> str:
        """ended, failed, or unfinished (running, stopped or killed)."""
        if self.summary is not None:
            return "ended"
        return "failed" if self.error is not None else "unfinished"

    def thoughts(self) -> Iterator[dict[str, Any]]:
        """Records of thoughts.jsonl, one after the other; incomplete lines are left out."""
        path = self.folder / "thoughts.jsonl"
        if not path.is_file():
            return
        with path.open("rb") as file:
            for line in file:
                yield from parse_records(line)[0]


def find_runs(folders: list[Path]) -> list[Path]:
    """Folders of runs: those given, or the ones below a folder that is no run.

    Raises ValueError for a folder without a run.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist; give a folder such as runs/default")
        if _is_run(folder):
            below = [folder]
        else:
            logs = [*folder.rglob("metrics.jsonl"), *folder.rglob("summary.json")]
            seen = [path.parent for path in logs if not is_hidden(path.relative_to(folder))]
            below = sorted({path for path in seen if _is_run(path)})
        if not below:
            raise ValueError(
                f"{folder} holds no run: give the folder of a run or of a sweep, such as "
                "runs/default or runs/default_sweep"
            )
        found += [path for path in below if path not in found]
    return found


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in DESCRIPTIONS)


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs of some folders, each with the settings in which it differs from the others."""
    runs = [_read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    keys = _differing(runs)
    for run in runs:
        run.overrides = {key: run.settings[key] for key in keys if key in run.settings}
    return runs


def _read_run(folder: Path) -> Run:
    path = next(folder / name for name in DESCRIPTIONS if (folder / name).is_file())
    try:
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} could not be read: {first}; give the folder of a run") from None
    if not isinstance(described, dict):
        raise ValueError(f"{path} does not describe a run; give the folder of a run")
    job = _read_object(folder / "job.json") or {}
    settings = _flat(described)
    for override in settings.pop("overrides", "").split("\n"):
        key, _, value = override.partition("=")
        if value:
            settings[key] = value
    return Run(
        folder=folder,
        name=str(described.get("name") or folder.name) if not job else folder.name,
        settings=settings,
        summary=_read_object(folder / "summary.json"),
        records=list(map(with_plain_names, _read_lines(folder / "metrics.jsonl"))),
        outcomes=_read_lines(folder / "outcomes.jsonl"),
        error=job.get("error"),
        measures=read_results(folder),
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file; the last line of one that is being written may be incomplete."""
    return parse_records(path.read_bytes())[0] if path.is_file() else []


def _read_object(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if there is none.

    Raises ValueError for a file that holds something else.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not what a run writes; remove it")
    return content


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted key, as text."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif key == "overrides" and isinstance(value, list):
            flat[key] = "\n".join(map(str, value))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else str(value)
    return flat


def _differing(runs: list[Run]) -> list[str]:
    """Keys of settings in which runs differ, the seed last."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = [
        key
        for key in keys
        if (key in COMPARED or key.partition(".")[0] not in NOT_COMPARED)
        and len({run.settings.get(key) for run in runs}) > 1
    ]
    return sorted(found, key=lambda key: key == "seed")
