"""A job on Slurm that is asked to end, without a Slurm; test_sweep_slurm.py has a real one."""

import os
import pickle
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, start_sweep

from mtp.cli.slurm import QUEUE_AGAIN


@pytest.mark.parametrize(
    ("code", "state", "is_queued"),
    [
        (128 + signal.SIGTERM, "RUNNING", True),
        (128 + signal.SIGUSR1, "RUNNING", True),
        (128 + signal.SIGUSR2, "RUNNING", True),
        (128 + signal.SIGTERM, "CANCELLED", False),
        (128 + signal.SIGTERM, "PENDING", False),
        (128 + signal.SIGKILL, "RUNNING", False),  # by the kernel, which has no memory left
        (1, "RUNNING", False),
        (0, "RUNNING", False),
    ],
)
def test_a_script_queues_its_job_again_if_a_signal_ended_it_and_nobody_cancelled_it(
    tmp_path, code, state, is_queued
):
    for name, text in {
        "squeue": f"echo {state}",
        "scontrol": f"echo $* > {tmp_path}/said",
        "sleep": "",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "script"
    script.write_text(f"#!/bin/bash\n{QUEUE_AGAIN}\n(exit {code})\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    said = tmp_path / "said"
    assert done.returncode == code
    assert (said.read_text() if said.is_file() else "") == "requeue 7\n" * is_queued


JOB = """
import pickle, signal, sys
from mtp.cli.slurm import end_if_asked
submission = pickle.loads(bytes.fromhex(sys.argv[1]))
for number in (signal.SIGTERM, signal.SIGCONT):  # as submitit does, which prints a line
    signal.signal(number, lambda number, frame: print("bypassed", number, flush=True))
if sys.argv[2] == "before":
    signal.raise_signal(signal.SIGTERM)
signal.raise_signal(signal.SIGCONT)
end_if_asked(submission.noted)
print("imports", flush=True)
if sys.argv[2] == "after":
    signal.raise_signal(signal.SIGTERM)
print("trains", flush=True)
"""


@pytest.mark.parametrize("moment", ["before", "after", "never"])
def test_a_job_that_has_nothing_to_save_yet_ends_by_sigterm_although_submitit_ignores_it(moment):
    from mtp.cli.hydra import Submission

    given = pickle.dumps(Submission("code", 1)).hex()
    done = subprocess.run(
        [sys.executable, "-c", JOB, given, moment],
        cwd=ROOT,
        env=os.environ | {"SUBMITIT_EXECUTOR": "slurm"},
        capture_output=True,
        text=True,
    )
    lines = {
        "before": ["bypassed 15", "bypassed 18"],
        "after": ["bypassed 18", "imports"],
        "never": ["bypassed 18", "imports", "trains"],
    }
    assert done.stdout.splitlines() == lines[moment], done.stderr
    assert done.returncode == (0 if moment == "never" else -signal.SIGTERM)


def test_a_submission_that_reaches_other_jobs_notes_no_signals():
    from mtp.cli.hydra import Submission

    assert pickle.loads(pickle.dumps(Submission("code", 1))) == Submission("code", 1)


def test_a_time_limit_within_the_delay_of_the_signal_is_refused(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    process = start_sweep(tmp_path, "sweep=submitit_slurm", "hydra.launcher.timeout_min=2")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 2 and not list(tmp_path.iterdir())
    assert said.startswith(
        "error: hydra.launcher.timeout_min must be above hydra.launcher.signal_delay_s=120 seconds"
    )
