"""The command that trains and measures the table's cells."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from mtp.channels import table
from mtp.channels.cells import MEASURED, Cell, plan

TRAINING = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])

def end(number, frame):
    time.sleep(0.5)
    (folder / "checkpoint").touch()
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, end)
(folder / "started").touch()
time.sleep(60)
"""
"""A training that writes a checkpoint at SIGTERM."""


@pytest.fixture
def handler():
    """Puts back the handler of SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_table_alone_ends_its_training_after_a_checkpoint(
    number, tmp_path, monkeypatch, handler
):
    monkeypatch.setattr(
        Cell, "command", lambda cell, *more: [sys.executable, "-c", TRAINING, str(tmp_path)]
    )
    options = ["--no-estimate", "--rows", "token", "--tasks", "pointers", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["table", *options, "--runs", str(tmp_path / "runs")])

    def signal_when_started() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=signal_when_started, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        sys.exit(table.main())
    assert ended.value.code == 128 + number
    assert (tmp_path / "checkpoint").exists()


def test_the_plan_without_an_estimate_lists_the_runs(tmp_path, monkeypatch, capsys):
    options = ["--plan", "--no-estimate", "--rows", "token", "soft", "--tasks", "pointers"]
    monkeypatch.setattr(sys, "argv", ["table", *options, "--runs", str(tmp_path / "runs")])
    assert table.main() == 0
    runs = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert runs == [
        ["6", "runs,", "0", "of", "them", "done"],
        ["pointers", "token", "3"],
        ["pointers", "soft", "3"],
    ]


def made(monkeypatch, folder, overrides, seeds=("1",), attempts=16) -> list[str]:
    """Make the table of one cell per seed, without training; what each training was asked for."""
    options = ["table", "--no-estimate", "--rows", "token", "--tasks", "running_sum_5"]
    options += ["--seeds", *seeds, "--attempts", str(attempts), "--runs", str(folder)]
    options += ["--out", str(folder / "table.json"), "--overrides", "logger=files", *overrides]
    asked: list[str] = []

    def run_train(cell, *more):
        asked.append(f"{cell.seed} {more[0]}")
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / "summary.json").touch()

    def measure(folder, num_problems, num_attempts, reader):
        numbers = {"accuracy": int(folder.name) / 10, "attempts": num_attempts}
        return numbers | {table.ATTEMPTED: num_problems}

    monkeypatch.setattr(table, "run_train", run_train)
    monkeypatch.setattr(table, "measure", measure)
    for name in ("write_plots", "add_equal_flops", "markdown"):
        monkeypatch.setattr(table, name, lambda *given: "")
    monkeypatch.setattr(sys, "argv", options)
    table.make_table(table.parser().parse_args())
    return asked


def test_runs_of_other_overrides_or_attempts_are_not_shown_as_those_of_this_command(
    tmp_path, monkeypatch
):
    assert made(monkeypatch, tmp_path, []) == ["1 resume=auto"]
    few, other = ["stages.main.steps=100"], r"running_sum_5/token/1 must be a run with .*, --runs"
    with pytest.raises(ValueError, match=other):
        made(monkeypatch, tmp_path, few, ["1", "2"])
    assert not (tmp_path / "running_sum_5" / "token" / "2").exists(), "found before any training"
    assert made(monkeypatch, tmp_path, ["fabric.num_threads=1"], ["1", "2"]) == ["2 resume=auto"]
    (row,) = table.known_rows(tmp_path / "table.json")
    assert row["accuracy_by_seed"] == [0.1, 0.2] and "steps=100" not in row["command"]
    with pytest.raises(ValueError, match=r"--attempts must be that of .*, 16, got 4; remove this"):
        made(monkeypatch, tmp_path, [], attempts=4)
    # A measurement that is removed is made again, if the settings of the run are still the same.
    (tmp_path / "running_sum_5" / "token" / "2" / MEASURED).unlink()
    assert made(monkeypatch, tmp_path, [], ["1", "2"]) == ["2 resume=true"]


def test_a_measurement_of_an_older_version_has_the_command_of_its_row(tmp_path, monkeypatch):
    (cell,) = plan(["token"], ["running_sum_5"], [1], tmp_path, [])
    cell.folder.mkdir(parents=True)
    (cell.folder / "summary.json").touch()
    (cell.folder / MEASURED).write_text(json.dumps({"accuracy": 0.9, "attempts": 16}))
    assert made(monkeypatch, tmp_path, []) == []
    with pytest.raises(ValueError, match="with these overrides, got one of 'train.py exp"):
        made(monkeypatch, tmp_path, ["stages.main.steps=100"])
