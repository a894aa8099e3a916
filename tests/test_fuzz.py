"""Impossible input ends in one line that names the mistake, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from fuzz import KINDS, Case, state, verdict_of  # noqa: E402


@pytest.mark.parametrize(
    "cases", [24, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_each_case_ends_in_a_named_error(cases):
    done = subprocess.run(
        [sys.executable, "benchmarks/fuzz.py", "--cases", str(cases), "--seed", "0", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["cases"] == found["named_errors"] == cases, done.stderr
    assert found["tracebacks"] == found["half_written"] == 0, done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("code", "said", "end"),
    [
        (2, "error: seed must be at least 0\n", "named"),
        (2, "usage: mtp\nmtp: error: argument --seed: bad\n", "named"),
        (2, "error: something is wrong\n", "unnamed"),
        (2, "a warning\nerror: seed must be at least 0\n", "unnamed"),
        (1, "Traceback (most recent call last):\nValueError: seed\n", "traceback"),
        (-9, "", "traceback"),
        (0, "", "taken"),
    ],
)
def test_an_end_is_classified_by_its_code_and_its_line(code, said, end):
    assert verdict_of(Case("train.py", [], ["seed"]), code, said) == end


def test_a_file_that_is_left_behind_is_seen(tmp_path):
    before = state(tmp_path)
    (tmp_path / "runs").mkdir()
    assert state(tmp_path) != before
    assert len(KINDS) == 8
