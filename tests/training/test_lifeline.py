"""A process of a run that dies ends the others, each with one line."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("lifeline_worker.py")


def start(mode: str, *how: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(WORKER), mode, *how],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines_until_connected(job: subprocess.Popen) -> list[str]:
    """Output until both processes are connected."""
    assert job.stdout is not None
    said: list[str] = []
    while said.count("connected") < 2:
        line = job.stdout.readline()
        assert line, said
        said.append(line.strip())
    return said


@pytest.mark.parametrize("mode", ["second_dies_at_start", "second_dies_later"])
def test_a_process_that_was_started_ends_the_one_that_started_it(mode):
    job = start(mode)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 1, said
    # Two watchers see it: the one of started processes, which knows the code, and the connection.
    assert re.search(
        r"error: process 1 of the run has ended( with code -9)?; its own output says why", said
    )
    assert "Traceback" not in said


@pytest.mark.parametrize("dead", [0, 1])
def test_processes_that_others_started_notice_each_others_death(dead):
    job = start("wait", "forked")
    (pids,) = re.findall(r"^(\d+) (\d+)$", "\n".join(lines_until_connected(job)), re.MULTILINE)
    os.kill(int(pids[dead]), signal.SIGKILL)
    said, _ = job.communicate(timeout=60)
    codes = ["-9 1", "1 -9"][dead]
    error = f"error: process {dead} of the run has ended; its own output says why"
    assert said.splitlines() == [error, codes]


def test_a_torchrun_that_is_killed_takes_its_processes_along():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", WORKER, "wait"]
    pipe = subprocess.PIPE
    job = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    lines_until_connected(job)
    job.kill()
    rest, _ = job.communicate(timeout=60)  # they hold the pipe until both have ended
    # The second may notice the end of the first before that of torchrun.
    assert "error: torchrun, which started this process, has ended\n" in rest
    assert len(re.findall("^error: .* has ended", rest, re.MULTILINE)) == 2


def test_processes_that_end_well_do_not_end_each_other():
    job = start("end", "forked")
    said, _ = job.communicate(timeout=120)
    assert said.splitlines()[-1] == "0 0", said
    assert "error" not in said
