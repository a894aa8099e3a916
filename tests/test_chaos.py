"""The short form of benchmarks/chaos.py: a few runs are killed, resumed and compared."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_killed_runs_end_with_the_bits_of_a_run_that_was_not_killed():
    command = [sys.executable, "benchmarks/chaos.py", "--kills", "5", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["kills"] == counted["bit_equal"] >= 5
    assert sum(counted["stages"].values()) == counted["kills"]
