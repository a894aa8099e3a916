"""Sweeps on a real Slurm of one node: jobs that are preempted or out of time are queued again."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from helpers import ROOT, SWEEP, start_sweep

from mtp.reports.json_lines import read_records
from mtp.reports.sweep import read_jobs

TINY = [*SWEEP, "logger.log_every=1", "sweep=submitit_slurm"]


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


def until(condition, process: subprocess.Popen, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.cluster
def test_a_sweep_on_slurm(tmp_path, slurm):
    arguments = ["hydra.launcher.cpus_per_task=1", "seed=1,2", "stages.main.steps=1"]
    process = start_sweep(tmp_path, *TINY, *arguments, env=slurm)
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said
    assert [job.status for job in read_jobs(tmp_path)] == ["done", "done"]
    assert "2 seeds" in said


@pytest.mark.cluster
def test_a_job_that_is_preempted_and_meets_its_time_limit_ends_with_the_bits_of_a_whole_run(
    tmp_path, slurm, request
):
    """Both signals reach the job within its first stage, which saves no checkpoint by itself."""
    steps = ["stages.main.steps=400", "stages.main.examples.batch_size=64"]
    cpus = f"hydra.launcher.cpus_per_task={os.cpu_count()}"
    process = start_sweep(tmp_path / "sweep", *TINY, "seed=3", cpus, *steps, env=slurm)
    request.addfinalizer(process.kill)
    job, output = tmp_path / "sweep" / "seed=3", tmp_path / "sweep" / ".submitit"

    def steps_done() -> int:
        path = job / "metrics.jsonl"
        return len(read_records(path)) if path.is_file() else 0

    def said(text: str) -> int:
        files = (path for path in output.rglob("*") if path.suffix in (".out", ".err"))
        return sum(path.read_text(errors="replace").count(text) for path in files)

    def command(*words: str) -> str:
        return subprocess.run(words, env=slurm, check=True, capture_output=True, text=True).stdout

    until(lambda: steps_done() > 2, process)
    number = command("squeue", "-h", "-o", "%F").split()[0]
    words = ["--partition=high", f"--cpus-per-task={os.cpu_count()}", "--output=/dev/null"]
    command("sbatch", *words, "--wrap=true")
    until(lambda: said("resumed in stage main at its step"), process)
    reached = steps_done()
    until(lambda: steps_done() > reached + 2, process)
    command("scontrol", "update", f"JobId={number}", "TimeLimit=1")
    until(lambda: said("Requeued job") + said("this job is") > 1, process)
    command("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    printed, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, printed
    assert said("resumed in stage main at its step") >= 2

    alone = [sys.executable, "train.py", *TINY, *steps, "seed=3", f"run_dir={tmp_path / 'whole'}"]
    subprocess.run(alone, cwd=ROOT, check=True, capture_output=True)
    weights = "stages/main/model.safetensors"
    assert (job / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    losses = [
        [r["loss"] for r in read_records(f / "metrics.jsonl") if "loss" in r]
        for f in (job, tmp_path / "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 400
    summary = json.loads((job / "summary.json").read_text())
    assert "changed_on_resume" not in summary
