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


def test_sigterm_ends_the_training_of_a_table_after_its_checkpoint(tmp_path, monkeypatch, handler):
    monkeypatch.setattr(
        Cell, "command", lambda cell, *more: [sys.executable, "-c", TRAINING, str(tmp_path)]
    )
    options = ["--no-estimate", "--rows", "token", "--tasks", "pointers", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["table", *options, "--runs", str(tmp_path / "runs")])

    def signal_when_started() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_when_started, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        table.main()
    assert ended.value.code == 143
    assert (tmp_path / "checkpoint").exists()
