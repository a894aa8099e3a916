"""`grace_seconds`: a run warns if it could not obey a signal in time, and the warning is true."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT
from rich.console import Console

import mtp.stages.checkpointing as checkpointing
from mtp.stages.checkpointing import check_grace
from mtp.training.runtime import StopRequest

SECONDS = 1.5
"""Duration of each step of the run."""
RUN = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from helpers import SWEEP, config
import mtp.stages.loop as loop
from mtp.trainer import train

original = loop.step_batches

def step_batches(run, stage, step):
    print("begins", step + 1, flush=True)
    time.sleep({SECONDS})
    return original(run, stage, step)

loop.step_batches = step_batches
train(config(Path(sys.argv[1]), *SWEEP, "checkpoint_minutes=0", "grace_seconds=" + sys.argv[2]))
"""


@pytest.mark.parametrize(("grace", "saved"), [(0.5, 2), (60, 3)])
def test_a_run_that_is_killed_after_the_grace_period_loses_a_step_only_if_it_has_warned(
    tmp_path, grace, saved
):
    """SIGTERM comes as the third step begins, and SIGKILL after the grace period."""
    command = [sys.executable, "-c", RUN, str(tmp_path / "run"), str(grace)]
    pipe = subprocess.PIPE
    job = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    assert job.stdout is not None
    said = ""
    try:
        while "begins 3\n" not in said:
            line = job.stdout.readline()
            assert line, said
            said += line
        job.send_signal(signal.SIGTERM)
        try:
            job.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            job.kill()
    finally:
        job.kill()
        said += job.communicate()[0]
    assert (job.returncode == -signal.SIGKILL) == (saved == 2), said
    found = sorted((tmp_path / "run" / "checkpoints").glob("step_*.safetensors"))
    assert int(found[-1].stem.removeprefix("step_")) == saved, said
    warning = "warning: step 1 of stage main took"
    assert said.count("longer than grace_seconds=") == (saved == 2) == (warning in said), said


IN_A_TERMINAL = """
import os, pty, sys
command = sys.argv[1:]
pid, terminal = pty.fork()
if pid == 0:
    os.execv(command[0], command)
said = b""
while b"begins 2" not in said:
    said += os.read(terminal, 1000)
os.close(terminal)  # the system sends SIGHUP
os.waitpid(pid, 0)
"""


def test_a_run_whose_terminal_closes_saves_a_checkpoint(tmp_path):
    script = RUN.replace('"checkpoint_minutes=0", ', "")
    run = [sys.executable, "-c", script, str(tmp_path / "run"), "60"]
    subprocess.run([sys.executable, "-c", IN_A_TERMINAL, *run], cwd=ROOT, check=True)
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*.safetensors")
    assert int(saved.stem.removeprefix("step_")) == 2


def test_a_hangup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_work_that_takes_just_the_grace_period_is_in_time_and_one_warning_is_enough(monkeypatch):
    monkeypatch.setattr(checkpointing, "time", SimpleNamespace(monotonic=lambda: 100.0))
    console = Console(record=True, width=400)
    settings = SimpleNamespace(grace_seconds=0.0)
    run = SimpleNamespace(config=settings, console=console, has_warned_of_grace=False)
    check_grace(run, "step 1", began=0.0)  # not known
    settings.grace_seconds = 20.0
    check_grace(run, "step 2", began=80.0)
    assert console.export_text() == ""
    check_grace(run, "the evaluation of stage main", began=79.5)
    check_grace(run, "step 3", began=0.0)
    assert console.export_text().startswith(
        "warning: the evaluation of stage main took 20.5 s, longer than grace_seconds=20: a signal"
    )
    assert run.has_warned_of_grace
