"""A sweep's table over fabricated jobs, with means and intervals worked out by hand."""

import csv
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY
from rich.console import Console

from mtp.cli.hydra import run_job
from mtp.cli.main import main as command
from mtp.hub.run_folder import REPLACED
from mtp.reports.interval import t_quantile
from mtp.reports.page.runs import find_runs
from mtp.reports.progress import make_console
from mtp.reports.sweep import group_by_seed, main, read_jobs, report
from mtp.reports.sweep_status import ago, print_status, read_status
from mtp.training.runtime import StopRequest, hand_on

ROOT = Path(__file__).parents[2]


def finished(
    folder: Path, overrides: dict[str, str], fast: float | None, seconds: float = 60, **noted
):
    """A job that is done, its last stage `rl` with the given fast accuracy."""
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"overrides": overrides, "error": None, **noted}))
    metrics = {"slow_accuracy": 1.0, "slow_passes": 24.0, "fast_passes": 8.0, "true_steps": None}
    stages = [
        {"name": "main", **metrics, "fast_accuracy": None, "seconds": 1.0},
        {"name": "rl", **metrics, "fast_accuracy": fast, "seconds": 2.0},
    ]
    (folder / "summary.json").write_text(json.dumps({"stages": stages, "seconds": seconds}))


@pytest.fixture
def sweep(tmp_path):
    for seed, fast in ((1, 0.90), (2, 0.92), (10, 0.97)):
        finished(tmp_path / f"lr=0.1,seed={seed}", {"lr": "0.1", "seed": str(seed)}, fast)
    finished(tmp_path / "lr=0.2,seed=1", {"lr": "0.2", "seed": "1"}, 0.5)
    return tmp_path


def test_mean_and_interval_over_seeds_are_those_worked_by_hand(sweep):
    """0.90, 0.92, 0.97: mean 0.93, s = sqrt(0.0026 / 2), t(2) = 4.3027."""
    jobs = read_jobs(sweep)
    assert [job.overrides["seed"] for job in jobs] == ["1", "2", "10", "1"]
    (group,) = group_by_seed(jobs)
    assert group.overrides == {"lr": "0.1"} and group.seeds == ["1", "2", "10"]
    assert group.mean["fast_accuracy"] == pytest.approx(0.93)
    half = 4.3027 * math.sqrt(0.0013) / math.sqrt(3)
    assert half == pytest.approx(0.08957, 1e-3)
    assert group.low["fast_accuracy"] == pytest.approx(0.93 - half)
    assert group.high["fast_accuracy"] == 1.0, "0.93 + 0.0896 is no share"
    assert group.low["slow_accuracy"] == group.high["slow_accuracy"] == 1.0
    assert group.mean["true_steps"] is None


def test_a_seed_of_two_sweeps_in_a_folder_counts_once(tmp_path):
    for folder, fast in (("monday/0", 0.1), ("tuesday/0", 0.8), ("tuesday/1", 0.9)):
        seed = "2" if folder.endswith("1") else "1"
        finished(tmp_path / folder, {"lr": "1", "seed": seed}, fast)
    (group,) = group_by_seed(read_jobs(tmp_path))
    assert sorted(group.seeds) == ["1", "2"]
    assert group.mean["fast_accuracy"] == pytest.approx(0.85)


def test_seeds_of_two_commands_are_one_group_only_if_their_other_settings_agree(tmp_path):
    """Seeds 1 and 2 took one step; 3, 4 and 5 took three at another rate, 5 with another prefix."""
    for seed, fast in ((1, 0.1), (2, 0.3), (3, 0.7), (4, 0.8), (5, 0.9)):
        settings = {"steps": "1"} if seed < 3 else {"steps": "3", "lr": "0.5"}
        if seed == 5:
            settings = {f"++{key}": value for key, value in settings.items()}
        settings |= {"task": "sum", "seed": str(seed)}
        finished(tmp_path / f"seed={seed}", {"seed": str(seed)}, fast, settings=settings)
    jobs = read_jobs(tmp_path)
    few, many = group_by_seed(jobs)
    assert few.seeds == ["1", "2"] and few.overrides == {"steps": "1"}
    assert many.seeds == ["3", "4", "5"] and many.overrides == {"steps": "3", "lr": "0.5"}
    assert few.mean["fast_accuracy"] == pytest.approx(0.2)
    assert many.mean["fast_accuracy"] == pytest.approx(0.8)
    assert read_status(tmp_path)[0].overrides == {"seed": "1"}, "as the command names its jobs"


def test_a_run_that_is_being_replaced_is_no_job(sweep):
    names = [job.folder for job in read_jobs(sweep)]
    first = sweep / names[0]
    shutil.copytree(first, sweep / "hidden")
    (sweep / "hidden").rename(first / REPLACED)
    assert [job.folder for job in read_jobs(sweep)] == names
    for folder in (first, first / REPLACED):
        (folder / "summary.json").write_text("{}")
        (folder / "config.yaml").write_text("{}")
    assert find_runs([sweep]) == [first]


def test_students_t_agrees_with_the_tables():
    table = {1: 12.7062, 4: 2.7764, 10: 2.2281, 11: 2.2010, 15: 2.1314, 29: 2.0452, 100: 1.9840}
    for freedom, value in table.items():
        assert t_quantile(freedom) == pytest.approx(value, abs=2e-4)


def test_the_table_lists_jobs_groups_and_what_failed(sweep, capsys):
    def fail() -> float:
        raise RuntimeError("out of [memory]\nsecond line")

    value = run_job(fail, sweep / "lr=9,seed=1", {"lr": "9", "seed": "1"})
    assert value is None
    assert "RuntimeError: out of [memory]" in capsys.readouterr().err
    (sweep / "lr=8,seed=1").mkdir()
    (sweep / "lr=8,seed=1" / "job.json").write_text('{"overrides": {"lr": "8"}, "error": null}')
    assert report(sweep, make_console()) == 1
    shown = capsys.readouterr().out
    assert "4 of 6 jobs done" in shown
    assert "93.0 (84.0–100.0) %" in shown and "3 seeds" in shown
    assert "failed: lr=9,seed=1: RuntimeError: out of [memory]\n" in shown
    assert "unfinished: lr=8,seed=1\n" in shown
    with (sweep / "sweep.csv").open() as file:
        rows = {row["folder"]: row for row in csv.DictReader(file)}
    assert rows["lr=0.2,seed=1"]["fast_accuracy"] == "0.5"
    assert rows["lr=0.2,seed=1"]["seconds"] == "60"
    assert rows["lr=9,seed=1"]["status"] == "failed"
    written = json.loads((sweep / "sweep.json").read_text())
    assert [len(written["jobs"]), len(written["groups"])] == [6, 1]


def test_a_mistake_in_a_job_is_one_line_and_the_next_run_of_it_forgets_the_error(tmp_path, capsys):
    from mtp.modeling.heads import HeadConfig

    folder = tmp_path / "head.num_slots=0"
    run_job(lambda: HeadConfig(num_slots=0).validate(), folder, {"head.num_slots": "0"})  # type: ignore[func-returns-value]
    error = capsys.readouterr().err
    assert error == "error: head.num_slots=0: head.num_slots must be at least 1, got 0\n"
    assert run_job(lambda: 0.5, folder, {"head.num_slots": "0"}) == 0.5
    assert json.loads((folder / "job.json").read_text())["error"] is None


def test_a_job_that_ends_forgets_the_error_that_another_command_noted_of_it(tmp_path):
    folder = tmp_path / "seed=1"

    def train() -> float:
        run_job(in_use, folder, {"seed": "1"})
        return 0.5

    def in_use() -> float:
        raise ValueError("in use by process 7")

    assert run_job(train, folder, {"seed": "1"}) == 0.5
    assert json.loads((folder / "job.json").read_text())["error"] is None


def test_a_run_that_does_not_take_other_settings_keeps_its_own_in_the_record(tmp_path):
    folder = tmp_path / "seed=1"
    trained = {"overrides": {"seed": "1"}, "settings": {"seed": "1", "stages.rl.steps": "7"}}

    def train() -> float:
        (folder / "config.yaml").write_text("seed: 1")
        return 0.5

    def refuse() -> float:
        raise ValueError("another configuration")

    assert run_job(train, folder, *trained.values()) == 0.5
    other = trained | {"settings": {"seed": "1", "stages.rl.steps": "9"}}
    run_job(refuse, folder, *other.values())
    noted = json.loads((folder / "job.json").read_text())
    assert noted == {**trained, "error": "ValueError: another configuration"}
    run_job(train, folder, *trained.values())
    assert json.loads((folder / "job.json").read_text()) == {**trained, "error": None}


def test_exit_codes_of_the_command(sweep, tmp_path, capsys):
    assert main([str(sweep)]) == 0
    assert main([str(tmp_path / "none")]) == 2
    assert "holds no jobs" in capsys.readouterr().err


def test_a_launchers_handler_acts_after_the_checkpoint_and_pythons_own_does_not():
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGUSR2)
            assert stop.signal == signal.SIGUSR2 and seen == []
        hand_on(signal.SIGUSR2)
        assert seen == [signal.SIGUSR2]
        hand_on(signal.SIGINT)
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_status_of_jobs_that_run_wait_or_have_stopped(tmp_path, capsys):
    """One job of each state; a process of another machine counts as running."""
    finished(tmp_path / "seed=1", {"seed": "1"}, 0.9)
    steps = "stages: {main: {steps: 30}, rl: {steps: 10}}\n"
    records = [
        {"stage": "main", "step": 30, "global_step": 30, "eval/slow_accuracy": 0.75},
        {"stage": "rl", "step": 4, "global_step": 34, "loss": 1.0},
    ]
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = socket.gethostname()
    for seed, lock in (
        (2, f"process {os.getpid()} on {here}\n"),
        (3, f"process {ended.pid} on {here}\n"),
        (4, "process 7 on node17\n"),
    ):
        job = tmp_path / f"seed={seed}"
        job.mkdir()
        (job / "job.json").write_text(json.dumps({"overrides": {"seed": str(seed)}}))
        (job / "config.yaml").write_text(steps)
        (job / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (job / ".mtp-lock").write_text(lock)
    (tmp_path / "seed=5").mkdir()
    (tmp_path / "seed=5" / "job.json").write_text('{"overrides": {}, "error": null}')
    (tmp_path / "seed=6").mkdir()
    (tmp_path / "seed=6" / "job.json").write_text('{"overrides": {}, "error": "no [disk]"}')
    jobs = read_status(tmp_path)
    states = ["done", "running", "stopped", "running", "waiting", "failed"]
    assert [job.state for job in jobs] == states
    second = jobs[1]
    assert (second.stage, second.step, second.steps) == ("rl", 34, 40)
    assert second.metrics == {"slow_accuracy": 0.75} and 0 <= (second.age or 0) < 60
    assert jobs[3].writer == "process 7 on node17"
    assert command(["sweep", "status", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    count = "1 done, 2 running, 1 stopped, 1 waiting, 1 failed"
    assert count in " ".join(shown.split()), "the title may be folded"
    assert "34 of 40" in shown and "75.0 %" in shown
    assert "failed: seed=6: no [disk]\n" in shown
    assert command(["sweep", "status", str(tmp_path), "--json"]) == 1
    listed = json.loads(capsys.readouterr().out)
    assert [job["state"] for job in listed] == states
    assert command(["sweep", "table", str(tmp_path)]) == 1
    assert "1 of 6 jobs done" in capsys.readouterr().out
    assert command(["sweep", "status", str(tmp_path / "seed=6")]) == 2
    assert "holds no jobs" in capsys.readouterr().err


def test_status_and_table_of_a_comparator_show_its_accuracy(tmp_path):
    """In a process of its own, which has not imported the channels."""
    finished(tmp_path / "seed=1", {"seed": "1"}, None)
    record = {"stage": "main", "step": 3, "global_step": 3, "eval/accuracy": 0.625}
    (tmp_path / "seed=1" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    stage = {"name": "main", "accuracy": 0.625, "passes": 5.0}
    summary = {"stages": [stage], "seconds": 1.0}
    (tmp_path / "seed=1" / "summary.json").write_text(json.dumps(summary))
    for action in ("status", "table"):
        words = [sys.executable, "-m", "mtp.cli.main", "sweep", action, str(tmp_path)]
        shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "accuracy" in shown and "62.5 %" in shown and "fast" not in shown


def test_status_lists_the_jobs_of_the_command_that_have_not_started(tmp_path, capsys):
    """A sweep of two seeds and two rates whose launcher has begun one job of the four, or none."""
    sweeper = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
    (tmp_path / "multirun.yaml").write_text(
        "name: x\nhydra:\n"
        f"  sweeper: {{_target_: {sweeper}, params: null}}\n"
        "  overrides: {task: ['name=x', 'seed=1,2', 'lr=0.1,0.2']}\n"
    )
    names = [f"lr={rate},seed={seed}" for seed in (1, 2) for rate in ("0.1", "0.2")]

    def listed():
        assert command(["sweep", "status", str(tmp_path), "--json"]) == 0
        return [(job["folder"], job["state"]) for job in json.loads(capsys.readouterr().out)]

    assert listed() == [(name, "not started") for name in names]
    finished(tmp_path / names[2], {"seed": "2", "lr": "0.1"}, 0.9)
    others = [(name, "not started") for name in names if name != names[2]]
    assert listed() == [(names[2], "done"), *others]
    assert command(["sweep", "status", str(tmp_path)]) == 0
    assert "1 done, 3 not started" in " ".join(capsys.readouterr().out.split())
    text = (tmp_path / "multirun.yaml").read_text()
    for other in (text.replace("Basic", "Optuna"), text.replace("seed=1,2", "head=glob(*)")):
        (tmp_path / "multirun.yaml").write_text(other)
        assert listed() == [(names[2], "done")], "the jobs to come are not known"


def test_tables_fit_a_narrow_terminal_without_colours(sweep):
    for width in (44, 60):
        file = io.StringIO()
        console = Console(file=file, force_terminal=True, no_color=True, width=width)
        print_status(console, Path("s"), read_status(sweep))
        assert "…" not in file.getvalue(), "nothing is cut"
        report(sweep, console)
        shown = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
        assert max(map(len, shown.splitlines())) <= width
        assert "s: 4 done" in shown and "4 of 4 jobs done" in " ".join(shown.split())
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", file.getvalue()), "no colours"


def test_ages_are_in_their_largest_unit():
    assert [ago(s) for s in (-1, 59, 61, 7300, 90000)] == [
        "0 s ago", "59 s ago", "1 min ago", "2 h ago", "1 d ago",
    ]  # fmt: skip


SHORT = [*TINY, "stages.joint.steps=1", "stages.rl.steps=1"]


def run_sweep(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", "-m", f"hydra.sweep.dir={folder}", *SHORT, *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_failing_job_does_not_stop_the_sweep_and_a_second_call_resumes(tmp_path, capsys):
    """Two jobs, the first impossible; each in its folder, and in wandb under the sweep's group.

    An override that all jobs share is no part of their names, whether it sets or adds a key.
    """
    arguments = ["head.taps=[9],[2]", "++stages.rl.steps=0", "logger=wandb"]
    done = run_sweep(tmp_path, *arguments)
    assert done.returncode == 1, done.stderr
    jobs = {tuple(job.overrides.values()): job for job in read_jobs(tmp_path)}
    assert jobs[("[9]",)].error.startswith("head.taps must be layers between 0 and ")
    assert jobs[("[2]",)].status == "done" and jobs[("[2]",)].stage == "joint"
    settings = jobs[("[2]",)].settings or {}
    assert settings["stages.rl.steps"] == "0" and settings["stages.joint.steps"] == "1"
    assert settings["head.taps"] == "[2]" and "logger" not in settings
    assert "1 of 2 jobs done" in done.stdout and "failed: head.taps=_9_-" in done.stdout
    folder = tmp_path / jobs[("[2]",)].folder
    (records,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert tmp_path.name.encode() in records.read_bytes()
    trained = (folder / "stages" / "joint" / "model.safetensors").stat().st_mtime_ns
    run_sweep(tmp_path, *arguments)
    assert (folder / "stages" / "joint" / "model.safetensors").stat().st_mtime_ns == trained
    failed = jobs[("[9]",)].folder
    shutil.rmtree(tmp_path / failed)
    capsys.readouterr()
    command(["sweep", "status", str(tmp_path), "--json"])
    states = {job["folder"]: job["state"] for job in json.loads(capsys.readouterr().out)}
    assert states == {failed: "not started", folder.name: "done"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_of_this_machine(tmp_path, launcher):
    pytest.importorskip("hydra_plugins.hydra_" + launcher.partition("_")[0] + "_launcher")
    done = run_sweep(tmp_path, f"sweep={launcher}", "seed=1,2")
    assert done.returncode == 0, done.stderr
    assert [job.status for job in read_jobs(tmp_path)] == ["done", "done"]
    assert "2 seeds" in done.stdout
