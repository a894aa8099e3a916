"""Sweeps on a real Slurm of one node: a job that is asked to end is queued again and continues."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, SWEEP, start_sweep

from mtp.reports.json_lines import read_records
from mtp.reports.sweep import read_jobs

TINY = [*SWEEP, "logger.log_every=1"]
ON_SLURM = ["sweep=submitit_slurm", "hydra.launcher.cpus_per_task=1"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a Slurm of one node."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip("needs root and Debian's slurm-wlm and munge")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder, script = tmp_path_factory.mktemp("slurm"), str(ROOT / "tests" / "slurm_one_node.sh")
    started = subprocess.run([script, "start", str(folder)], capture_output=True, text=True)
    try:
        if started.returncode:
            pytest.skip(f"Slurm does not start on this machine: {started.stderr.strip()}")
        yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([script, "stop", str(folder)], check=True)


@pytest.mark.cluster
def test_a_sweep_on_slurm(tmp_path, slurm):
    settings = [*TINY, *ON_SLURM]
    process = start_sweep(tmp_path, *settings, "seed=1,2", "stages.main.steps=1", env=slurm)
    said, _ = process.communicate(timeout=1600)
    assert process.returncode == 0, said
    assert [job.status for job in read_jobs(tmp_path)] == ["done", "done"]
    assert "2 seeds" in said


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


class Job:
    """The one job of a sweep on Slurm, while it runs."""

    def __init__(self, sweep: Path, launcher: subprocess.Popen, slurm: dict[str, str]):
        self.folder, self.output = sweep / "job0", sweep / ".submitit"
        self.launcher, self.slurm = launcher, slurm
        self.until(lambda: self.output.is_dir() and self.command("squeue", "-h", "-o", "%i"))
        self.number = self.command("squeue", "-h", "-o", "%i").split()[0]

    def command(self, *words: str) -> str:
        done = subprocess.run(words, env=self.slurm, check=True, capture_output=True, text=True)
        return done.stdout

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 1200
        while not condition():
            assert self.launcher.poll() is None, self.launcher.communicate()[0]
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def said(self) -> str:
        files = sorted(path for path in self.output.rglob("*") if path.suffix in (".out", ".err"))
        return "".join(path.read_text(errors="replace") for path in files)

    def shown(self, name: str) -> str:
        """A value that Slurm shows of the job."""
        shown = self.command("scontrol", "show", "job", self.number)
        return shown.split(f"{name}=")[1].split()[0]

    def has_python(self) -> bool:
        """True while a process of the job has started Python."""
        words = [sys.executable, "-u", "-m", "submitit.core._submit", f"{self.output}/%j"]
        given = "".join(f"{word}\0" for word in words).encode()
        return any(_read(path) == given for path in Path("/proc").glob("[0-9]*/cmdline"))

    def starts(self) -> int:
        """Number of processes of the job that have begun to read their task."""
        return self.said().count("Loading pickle")

    def steps(self) -> int:
        """Steps that have been recorded."""
        path = self.folder / "metrics.jsonl"
        return len(read_records(path)) if path.is_file() else 0

    def resumed_at(self) -> list[int]:
        """The step that each of its processes has continued with."""
        found = re.findall(r"resumed in stage main at its step (\d+)", self.said())
        return [int(step) for step in found]

    def signal(self, name: str) -> None:
        self.command("scancel", f"--signal={name}", self.number)


@pytest.mark.cluster
def test_a_job_that_is_asked_to_end_at_any_time_ends_with_the_bits_of_a_whole_run(
    tmp_path, slurm, request
):
    """All in its first stage, which saves no checkpoint by itself."""
    settings = [*TINY, "seed=3", "stages.main.steps=600", "stages.main.examples.batch_size=64"]
    whole = [sys.executable, "train.py", *settings, f"run_dir={tmp_path / 'whole'}"]
    alone = subprocess.Popen(whole, cwd=ROOT, stdout=subprocess.DEVNULL)
    request.addfinalizer(lambda: end(alone))
    launcher = start_sweep(tmp_path / "sweep", *ON_SLURM, *settings, env=slurm)
    request.addfinalizer(lambda: end(launcher))
    job = Job(tmp_path / "sweep", launcher, slurm)
    begun = job.folder / "job.json"

    def asked_while_it_starts(signal: str, moment: Callable[[], object]) -> None:
        restarts = int(job.shown("Restarts"))
        job.until(moment)
        job.signal(signal)
        job.until(lambda: int(job.shown("Restarts")) == restarts + 1)
        begun.unlink(missing_ok=True)

    asked_while_it_starts("TERM", job.has_python)
    starts = job.starts()
    asked_while_it_starts("TERM", lambda: job.starts() > starts)  # Hydra composes the config
    for signal in ("TERM", "USR1", "USR2"):  # imports of torch and so on follow
        asked_while_it_starts(signal, begun.is_file)
    assert job.steps() == 0 and not job.resumed_at()

    def is_asked_to_end(ask: Callable[[], object]) -> None:
        """At most the step is lost that was not recorded yet when the job was asked."""
        resumed, steps = len(job.resumed_at()), job.steps()
        job.until(lambda: job.steps() > steps + 2)
        steps = job.steps()
        ask()
        job.until(lambda: len(job.resumed_at()) > resumed)
        assert job.resumed_at()[-1] > steps

    def preempt() -> None:
        words = "sbatch --wait --partition=high --exclusive --output=/dev/null --wrap=true"
        job.command(*words.split())

    def let_time_run_out() -> None:
        """The signal comes two minutes before the limit."""
        restarts, hours, minutes, _ = job.shown("Restarts"), *job.shown("RunTime").split(":")
        limit = 60 * int(hours) + int(minutes) + 2
        job.command("scontrol", "update", f"JobId={job.number}", f"TimeLimit={limit}")
        job.until(lambda: job.shown("Restarts") != restarts)
        job.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")

    is_asked_to_end(preempt)
    is_asked_to_end(lambda: job.command("scontrol", "requeue", job.number))
    is_asked_to_end(lambda: job.signal("USR1"))
    is_asked_to_end(let_time_run_out)
    printed, _ = launcher.communicate(timeout=1800)
    assert launcher.returncode == 0, printed

    assert alone.wait(timeout=1800) == 0
    weights = "stages/main/model.safetensors"
    assert (job.folder / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    losses = [
        [r["loss"] for r in read_records(f / "metrics.jsonl") if "loss" in r]
        for f in (job.folder, tmp_path / "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 600
    assert "changed_on_resume" not in json.loads((job.folder / "summary.json").read_text())


@pytest.mark.cluster
def test_a_job_that_is_cancelled_is_not_queued_again(tmp_path, slurm, request):
    settings = [*TINY, *ON_SLURM, "seed=3", "stages.main.steps=100000"]
    launcher = start_sweep(tmp_path, *settings, env=slurm)
    request.addfinalizer(lambda: end(launcher))
    job = Job(tmp_path, launcher, slurm)
    job.until(lambda: job.steps() > 2)
    job.command("scancel", job.number)
    job.until(lambda: job.shown("JobState") == "CANCELLED")
    job.until(lambda: "(CG)" not in job.command("squeue", "-h", "-o", "(%t)"))
    assert job.shown("JobState") == "CANCELLED" and job.shown("Restarts") == "0"
    assert [found.status for found in read_jobs(tmp_path)] == ["unfinished"]
    assert list((job.folder / "checkpoints").glob("step_*")), "saved after the step"
