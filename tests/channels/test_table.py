"""The command that trains and measures the table's cells."""

import os
import signal
import sys
import threading
import time

import pytest

from mtp.channels import table
from mtp.channels.cells import Cell

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
