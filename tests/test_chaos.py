"""The short form of benchmarks/chaos.py: a few runs are killed, resumed and compared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=[pytest.mark.slow, pytest.mark.long])])
def test_killed_runs_end_with_the_bits_of_a_run_that_was_not_killed(kills):
    command = [sys.executable, "benchmarks/chaos.py", "--kills", str(kills), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["kills"] == counted["bit_equal"] >= kills
    assert sum(counted["stages"].values()) == counted["kills"]
