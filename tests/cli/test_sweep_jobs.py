"""Jobs of a sweep: they run the code of the submission, and end with the command that started them.

Launchers and sweepers are the optional extra [sweep]; each test skips if its plugin is missing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, SWEEP, start_sweep

from mtp.cli import code_copy
from mtp.common.lock import writer_of
from mtp.common.watch import wait_for_end
from mtp.reports.sweep import read_jobs

TINY = ["stages.main.steps=1", *SWEEP]
"""One step and its evaluation."""


def sweep(folder: Path, *arguments: str) -> tuple[int, str]:
    process = start_sweep(folder, *TINY, *arguments)
    said, _ = process.communicate(timeout=1800)
    return process.returncode, said


def test_a_copy_is_named_by_its_content_and_holds_what_a_job_imports(tmp_path, monkeypatch):
    sources = {name: tmp_path / "checkout" / name for name in code_copy.PACKAGES}
    for source in sources.values():
        (source / "__pycache__").mkdir(parents=True)
        (source / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"compiled")
        (source / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(code_copy, "_source", sources.__getitem__)
    first = code_copy.copy_code(tmp_path / ".code")
    assert code_copy.copy_code(tmp_path / ".code") == first
    files = {str(p.relative_to(first)) for p in first.rglob("*") if p.is_file()}
    assert files == {"mtp/a.py", "mtp_kernels/a.py", "version.json"}
    assert json.loads((first / "version.json").read_text())["from"] == str(sources["mtp"])

    (sources["mtp"] / "a.py").write_text("x = 2\n")
    second = code_copy.copy_code(tmp_path / ".code")
    assert sorted(p.name for p in (tmp_path / ".code").iterdir()) == sorted(
        [first.name, second.name]
    )
    assert (first / "mtp" / "a.py").read_text() == "x = 1\n"
    monkeypatch.setattr(code_copy, "this_code", lambda: second)
    code_copy.check_code(second.name)
    with pytest.raises(ValueError, match=f"the code of its submission, .code/{first.name} in"):
        code_copy.check_code(first.name)


def test_the_end_of_a_process_is_seen_before_its_parent_has_waited_for_it():
    """A killed launcher stays a zombie as long as nobody waits for it."""
    process = subprocess.Popen(["sleep", "60"])
    process.kill()
    wait_for_end(process.pid)
    assert process.wait() == -signal.SIGKILL
    wait_for_end(process.pid)


JOB = """
import signal, sys, time
from mtp.common import watch
watch.GRACE = 0.2
if sys.argv[2] == "busy":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
watch.end_with(int(sys.argv[1]), "its launcher has ended")
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["asked", "busy", "unread"])
def test_a_job_ends_with_its_launcher_even_if_it_is_busy_or_nobody_reads_its_output(kind):
    """The launcher need not be the job's parent, as with submitit."""
    launcher = subprocess.Popen(["sleep", "600"])
    command = [sys.executable, "-c", JOB, str(launcher.pid), kind]
    pipe = subprocess.PIPE
    job = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert job.stdout is not None and job.stderr is not None
    try:
        assert job.stdout.readline() == "ready\n"
        if kind == "unread":
            job.stdout.close()
            job.stderr.close()
        launcher.kill()
        assert job.wait(timeout=60) == -(signal.SIGALRM if kind == "busy" else signal.SIGTERM)
        if kind != "unread":
            assert job.stderr.read() == "error: its launcher has ended\n"
    finally:
        for process in (launcher, job):
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_jobs_run_the_config_and_code_of_the_submission(tmp_path, monkeypatch):
    """The checkout is edited while the first of two jobs runs."""
    checkout = tmp_path / "checkout"
    code_copy.copy_code(tmp_path / "code").rename(checkout)
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    command = [sys.executable, "-m", "mtp.cli.main", "train", "-m", "seed=1,2"]
    command += [f"hydra.sweep.dir={tmp_path / 'sweep'}", *TINY]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        first = tmp_path / "sweep" / "seed=1"
        while not first.is_dir() and process.poll() is None:
            time.sleep(0.05)
        (checkout / "mtp" / "trainer.py").write_text("raise ValueError('edited')\n")
        for path in (checkout / "mtp" / "conf").rglob("*.yaml"):
            path.write_text("edited: true\n")
        assert process.wait(timeout=1800) == 0
    assert [job.status for job in read_jobs(tmp_path / "sweep")] == ["done", "done"]


@pytest.mark.slow
def test_optuna_raises_the_accuracy_and_a_failed_job_does_not_end_it(tmp_path):
    """The same command proposes the same values again, so finished jobs are not trained again."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    arguments = ["sweeper=optuna", "hydra.sweeper.n_trials=3", "head.taps=[2],[9]"]
    arguments += ["stages.main.optimizers.main.lr=tag(log,interval(1e-5,1e-2))"]
    code, said = sweep(tmp_path, *arguments)
    assert code == 1 and "best accuracy, 0.0 %: head.taps=[2], stages." in said, said
    jobs = read_jobs(tmp_path)
    assert {job.overrides["head.taps"]: job.status for job in jobs} == {
        "[2]": "done", "[9]": "failed"
    }  # fmt: skip
    rates = [float(job.overrides["stages.main.optimizers.main.lr"]) for job in jobs]
    assert len(set(rates)) == 3 and all(1e-5 <= rate <= 1e-2 for rate in rates)
    code, said = sweep(tmp_path, *arguments)
    assert [job.folder for job in read_jobs(tmp_path)] == [job.folder for job in jobs]
    assert "has ended; use overwrite=true" in said


@pytest.mark.slow
def test_a_sweep_on_a_ray_of_this_machine(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    code, said = sweep(tmp_path, "sweep=ray", "seed=1,2")
    assert code == 0, said
    assert [job.status for job in read_jobs(tmp_path)] == ["done", "done"]
    assert "2 seeds" in said


@pytest.mark.cluster
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_a_launcher_that_is_killed_takes_its_jobs_along(tmp_path, launcher):
    pytest.importorskip("hydra_plugins.hydra_" + launcher.partition("_")[0] + "_launcher")
    arguments = [*TINY, f"sweep={launcher}", "seed=1,2", "stages.main.steps=100000"]
    process = start_sweep(tmp_path, *arguments)
    writers: list[int] = []
    try:
        while len(writers) < 2:
            assert process.poll() is None, process.communicate()[0]
            found = [writer_of(path) for path in tmp_path.glob("seed=*")]
            writers = [writer.process for writer in found if writer is not None]
            time.sleep(0.2)
        assert os.getpid() not in writers and process.pid not in writers
    finally:
        process.kill()
    killed = time.monotonic()
    for writer in writers:
        wait_for_end(writer)
    assert time.monotonic() - killed < 60, "about 10 s, or a step, on a machine that is not busy"
    process.communicate()
    assert [job.status for job in read_jobs(tmp_path)] == ["unfinished", "unfinished"]
