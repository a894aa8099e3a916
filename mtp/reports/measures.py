"""Results of `mtp evaluate --measure`: a file for each stage and measure in a run's folder.

    runs/default/measures/rl.channel.json

A result is an object: `measure`, `stage`, `settings`, metrics by their declared names, `intervals`
of them, for some `NAME_by_slot` (a value per slot; the last one is slot k) and `curves` (points
over the length of a thought, see `mtp/evaluation/faithfulness.py`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..common.files import save_text
from .metrics import Metric, measured
from .metrics import Table as TableName
from .tables import print_metrics

FOLDER = "measures"
"""Folder of the results in a run's folder."""
TABLES: dict[str, TableName] = {"channel": "channel", "gradient": "gradient", "thought": "thought"}
"""Measures, and the table that shows each one's metrics."""


@dataclass(frozen=True)
class Curve:
    """A share over the length of a thought."""

    curve: str
    """Name of the curve."""
    value: str
    """Name of the share in its points."""
    title: str


CURVES = (
    Curve("early", "same", "early answering: same answer"),
    Curve("early", "accuracy", "early answering: right"),
    Curve("filler", "same", "filler: same answer"),
    Curve("mistake", "same", "mistake: same answer"),
    Curve("mistake", "followed", "mistake: answer that it leads to"),
    Curve("unchanged", "same", "cut without a mistake: same answer"),
    Curve("paraphrase", "accuracy", "paraphrase, early answering: right"),
    Curve("retokenised", "accuracy", "other tokens, early answering: right"),
    Curve("reader", "accuracy", "frozen reader, early answering: right"),
)
"""Curves that tables and plots show."""


def path_of(run: Path, stage: str, measure: str) -> Path:
    """File of a result."""
    return run / FOLDER / f"{stage}.{measure}.json"


def save_result(run: Path, result: dict[str, Any]) -> Path:
    """Write a result into a run's folder; an earlier one of its stage and measure is replaced."""
    path = path_of(run, result["stage"], result["measure"])
    save_text(path, json.dumps(result, indent=1) + "\n")
    return path


def read_results(run: Path) -> list[dict[str, Any]]:
    """The results in a run's folder, by measure. Raises ValueError for a file of another kind."""
    found = []
    for measure in TABLES:
        for path in sorted((run / FOLDER).glob(f"*.{measure}.json")):
            try:
                result = json.loads(path.read_bytes())
            except ValueError:
                result = None
            if not isinstance(result, dict) or result.get("measure") != measure:
                raise ValueError(f"{path} is not a result of mtp evaluate --measure; remove it")
            found.append(result)
    return found


def forget_results(run: Path, stage: str) -> None:
    """Remove the results of a stage whose model is replaced."""
    for measure in TABLES:
        path_of(run, stage, measure).unlink(missing_ok=True)


def print_result(console: Console, title: str, result: dict[str, Any]) -> None:
    """The metrics of a result, then its values by slot, then its curves."""
    table = TABLES[result["measure"]]
    print_metrics(console, title, table, {result["stage"]: result})
    slots = by_slot(result)
    if slots:
        shown = Table(title="by slot; slot 0 is main's")
        shown.add_column("metric")
        num_slots = max(len(result[f"{metric.name}_by_slot"]) for metric in slots)
        for slot in range(num_slots):
            shown.add_column(str(slot), justify="right")
        for metric in slots:
            name = f"{metric.name}_by_slot"
            cells = [
                metric.cell(value, None if ends is None else (ends[0], ends[1]))
                for value, ends in zip(result[name], result["intervals"][name], strict=True)
            ]
            shown.add_row(metric.title, *["-"] * (num_slots - len(cells)), *cells)
        console.print(shown)
    if "curves" in result:
        print_curves(console, result["curves"])


def by_slot(result: dict[str, Any]) -> list[Metric]:
    """Metrics of a result that have values by slot."""
    metrics = measured(TABLES[result["measure"]], [result])
    return [metric for metric in metrics if f"{metric.name}_by_slot" in result]


def print_curves(console: Console, curves: dict[str, list[dict[str, Any]]]) -> None:
    """A row for each curve, a column for each place."""
    places = sorted({point["at"] for points in curves.values() for point in points})
    shown = Table(title="shares of problems in %, by place in the thought")
    shown.add_column("curve")
    for place in places:
        shown.add_column(f"{100 * place:.3g} %", justify="right")
    for curve in CURVES:
        values = {p["at"]: p.get(curve.value) for p in curves.get(curve.curve, [])}
        if any(value is not None for value in values.values()):
            found = [values.get(place) for place in places]
            cells = ["-" if value is None else f"{100 * value:.1f}" for value in found]
            shown.add_row(curve.title, *cells)
    console.print(shown)
