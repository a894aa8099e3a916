"""The estimate of a dry run."""

import json

from mtp.stages.dry_run import estimate


def test_later_steps_count_as_the_median_after_the_warm_up(tmp_path):
    log = tmp_path / "metrics.jsonl"
    times = {"joint": [90.0, 5.0, 40.0, 2.0, 1.0, 30.0], "rl": [12.0, 18.0]}
    records = [{"stage": s, "step_time": t} for s, values in times.items() for t in values]
    records.insert(3, {"stage": "joint", "eval/slow_accuracy": 0.5})
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = {"stages": [{"name": "joint", "seconds": 1e9}, {"name": "rl", "seconds": 1e9}]}
    # joint: 168 s were taken, 96 steps of 2 s are left; rl: 30 s, and nothing is left.
    assert estimate({"joint": 102, "rl": 2}, summary, log) == (
        "a full run would take about 6 min and its evaluations (joint 6.0, rl 0.5)"
    )
