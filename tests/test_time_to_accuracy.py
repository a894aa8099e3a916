"""benchmarks/time_to_accuracy.py: the seconds of evaluations, and the table made of them."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from time_to_accuracy import Point, point_before, points_of, show, table


def log(folder, steps):
    """A log of steps of two seconds with an evaluation after every second one."""
    records = [{"stage": "joint", "step": 1, "step_time": 50.0}]
    for step in steps:
        records.append({"stage": "rl", "step": step, "step_time": 2.0})
        if step % 2 == 0:
            accuracy = {"eval/fast_accuracy": step / 10, "eval/fast_passes": 4.0}
            records.append({"stage": "rl", "step": step, **accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_evaluations_come_after_the_seconds_of_all_steps_before(tmp_path):
    found = points_of(log(tmp_path, range(1, 5)), "fast", begin=100.0)
    assert found == [Point(104.0, 0.2, 4.0), Point(108.0, 0.4, 4.0)]


def test_a_log_that_lacks_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the time of each of 4 steps, got 3; remove"):
        points_of(log(tmp_path, [1, 2, 4]), "fast", begin=0.0)


def test_what_the_start_reaches_takes_no_time(tmp_path, capsys):
    stages = [
        {"name": "main", "slow_accuracy": 0.1, "slow_passes": 9.0},
        {"name": "joint", "slow_accuracy": 0.7, "slow_passes": 8.0},
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"stages": stages}))
    start = point_before(tmp_path, "joint", "slow")
    assert start == Point(0.0, 0.7, 8.0)
    better = {"trl, 1": [start, Point(90.0, 0.9, 8.0)], "fast, a": [start, Point(30.0, 0.9, 2.0)]}
    rows = {row["accuracy"]: row for row in table(better)}
    assert rows[0.7]["trl"] == {"setting": "trl, 1", "seconds": 0.0, "accuracy": 0.7, "passes": 8.0}
    show(list(rows.values()))
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["70"][-1] == "-" and lines["90"][-1] == "3.00" and lines["95"][2:] == ["-"] * 3
