"""A process of a run that dies ends the others, each with one line."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("lifeline_worker.py")


def start(mode: str, rank: int | None = None, port: str = "") -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if rank is not None:
        environment |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_PORT": port}
        environment |= {"MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, str(WORKER), mode],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


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
    port = free_port()
    jobs = [start("wait", rank, port) for rank in range(2)]
    for job in jobs:
        assert job.stdout is not None
        while job.stdout.readline().strip() != "connected":
            assert job.poll() is None
    jobs[dead].send_signal(signal.SIGKILL)
    began = time.monotonic()
    said, _ = jobs[1 - dead].communicate(timeout=60)
    jobs[dead].communicate()
    assert jobs[1 - dead].returncode == 1
    assert said.strip() == f"error: process {dead} of the run has ended; its own output says why"
    assert time.monotonic() - began < 60


def test_a_torchrun_that_is_killed_takes_its_processes_along():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", WORKER, "wait"]
    pipe = subprocess.PIPE
    job = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    assert job.stdout is not None
    said: list[str] = []
    while said.count("connected") < 2:
        line = job.stdout.readline()
        assert line, said
        said.append(line.strip())
    job.kill()
    rest, _ = job.communicate(timeout=60)  # they hold the pipe until both have ended
    # The second may notice the end of the first before that of torchrun.
    assert "error: torchrun, which started this process, has ended\n" in rest
    assert len(re.findall("^error: .* has ended", rest, re.MULTILINE)) == 2


def test_processes_that_end_well_do_not_end_each_other():
    port = free_port()
    jobs = [start("end", rank, port) for rank in range(2)]
    said = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert not any("error" in text for text in said)
