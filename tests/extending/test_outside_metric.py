"""A metric declared outside of mtp is shown by every table whose summaries have it."""

import json

import pytest
from rich.console import Console

from mtp.hub.model_card import _table
from mtp.reports.comparison import aggregate, print_variants, read_runs
from mtp.reports.metrics import METRICS, Metric, declare
from mtp.reports.sweep import report
from mtp.reports.tables import print_table

DIGITS = Metric(
    "mean_digits",
    "digits a thought",
    unit="digits",
    better="lower",
    meaning="mean number of digits",
)


@pytest.fixture(autouse=True)
def declared():
    """The metric, declared for one test."""
    declare(DIGITS)
    yield
    del METRICS[DIGITS.name]


def summary(seed: int, digits: float | None) -> dict:
    stage = {"name": "rl", "fast_accuracy": 0.5, "mean_digits": digits, "num_problems": 8}
    return {"stages": [stage], "seed": seed, "seconds": 1.0, "export": "out"}


def shown(print_it, *arguments) -> str:
    """Output of a function on a console of 100 columns."""
    console = Console(width=100, record=True, quiet=False, file=None, force_terminal=False)
    print_it(console, *arguments)
    return console.export_text()


def test_a_run_and_its_card_show_it(capsys):
    text = shown(print_table, summary(1, 12.25))
    assert "digits a thought ↓" in text and "12.2" in text
    card = _table(summary(1, 12.25))
    assert "| digits a thought |" in card and "| 12.2 |" in card
    assert "- Digits a thought: mean number of digits; lower is better." in card


def test_a_sweep_and_a_comparison_show_it(tmp_path, capsys):
    for seed, digits in ((1, 11.0), (2, 13.0)):
        folder = tmp_path / f"seed={seed}"
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(summary(seed, digits)))
        (folder / "run.yaml").write_text(f"name: study/mine/{seed}\nseed: {seed}\n")
    text = shown(lambda console: report(tmp_path, console))
    assert "digits" in text and "11.0" in text and "13.0" in text
    found = aggregate(read_runs(tmp_path))
    assert found["arms"]["mine"]["mean_digits"] == 12.0
    text = shown(print_variants, found)
    assert "digits" in text and "12.0" in text


def test_tables_without_it_do_not_name_it(capsys):
    assert "digits" not in shown(print_table, summary(1, None))


def test_a_name_is_declared_once():
    declare(DIGITS)
    with pytest.raises(ValueError, match="metric mean_digits must be declared once"):
        declare(Metric("mean_digits", "other"))
