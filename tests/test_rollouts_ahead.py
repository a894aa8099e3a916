"""Rollouts that another process samples: by lag, over checkpoints, and with Ray itself."""

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TINY, config, records

import mtp.groups as groups
from mtp.hub.checkpoint import read_state
from mtp.trainer import Interrupted, train
from mtp.training.remote_sampler import Blueprint, RemoteSampler, Worker, packed, unpacked
from mtp.training.sharding import weights_of

RL = [
    "stages.head.steps=0",
    "stages.joint.steps=0",
    "stages.main.steps=2",
    "stages.rl.steps=4",
    "stages.rl.evaluate_every=0",
    "fabric.num_threads=1",
]
CORRECTED = ["stages.rl.rollouts.recompute_old=true", "stages.rl.objective.policy.correction_cap=2"]


class SamplesHere:
    """The sampler without its process: it samples at once, with a copy of the weights."""

    def __init__(self, fabric, model, fmt, config):
        self.worker = Worker(Blueprint.of(model), fmt, config, "cpu")

    def submit(self, request, model):
        return request, packed(copy.deepcopy(weights_of(model)))

    def result(self, asked):
        return self.worker.sample(*asked)

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(groups, "RemoteSampler", SamplesHere)


def numbers(folder):
    """All numbers of a run but times."""
    return [
        {name: value for name, value in record.items() if not name.endswith("seconds")}
        for record in records(folder)
    ]


def test_weights_arrive_as_they_were_sent():
    given = {"a": torch.randn(3, 4).bfloat16(), "b": torch.tensor(5), "c": torch.randn(2).double()}
    found = unpacked(packed(given))
    assert list(found) == list(given)
    for name, value in given.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def check_same(folder):
    """A run with lag 0 has the numbers of one without the other process."""
    train(config(folder / "alone", *RL))
    train(config(folder / "lag", *RL, "stages.rl.rollouts.lag=0"))
    assert numbers(folder / "lag") == numbers(folder / "alone")


def test_with_lag_0_a_run_is_the_same_as_without_the_other_process(tmp_path, here):
    check_same(tmp_path)


def test_with_lag_1_rollouts_are_sampled_by_the_weights_before_the_last_update(tmp_path, here):
    train(config(tmp_path, *RL, *CORRECTED, "stages.rl.rollouts.lag=1"))
    steps = [one for one in records(tmp_path) if "reward" in one]
    apart = [one["main/sampling_logp_difference_max"] for one in steps]
    assert apart[0] < 1e-4, "the first step's weights are those that sampled"
    assert min(apart[1:]) > 1e-4
    assert all(abs(one["main/importance_sampling_ratio"] - 1) < 0.5 for one in steps)


def stop_after(monkeypatch, number):
    """Ask a run to stop after this many optimizer steps of its RL stage."""
    import mtp.stages.loop as loop

    taken = iter(range(1, 100))
    original = loop.take_update

    def counted(run, stage, *given, **named):
        found = original(run, stage, *given, **named)
        if stage.name == "rl" and next(taken) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(loop, "take_update", counted)


def check_resumed(folder, monkeypatch):
    """A run with lag 1 that is stopped and resumed has the numbers of a whole one."""
    given = [*RL, *CORRECTED, "stages.rl.rollouts.lag=1"]
    train(config(folder / "whole", *given))
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Interrupted):
            train(config(folder / "cut", *given))
    train(config(folder / "cut", *given, "resume=true"))
    assert numbers(folder / "cut") == numbers(folder / "whole")


def test_a_run_that_was_stopped_has_the_rollouts_that_were_asked_for(tmp_path, here, monkeypatch):
    check_resumed(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lag=1"], "rollouts.lag=1 samples by weights that are one step old; set .*recompute_old"),
        (
            ["lag=0", "drop_uninformative=true", "max_rounds=2"],
            "rollouts.max_rounds must be 1 with stages.rl.rollouts.lag=0, got 2",
        ),
        (["lag=2"], "stages.rl.rollouts.lag must be at most 1, got 2"),
    ],
)
def test_a_lag_that_cannot_be_right_is_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, *RL, *(f"stages.rl.rollouts.{one}" for one in given)))


def test_shards_are_not_sent(tmp_path):
    with pytest.raises(ValueError, match="lag=0 sends whole weights .* got fabric.strategy=fsdp2"):
        config(tmp_path, *RL, "stages.rl.rollouts.lag=0", "fabric.strategy=fsdp2")


@pytest.mark.slow
def test_ray_samples_the_same_rollouts_and_a_stopped_run_resumes(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the optional extra [ray]")
    check_same(tmp_path)
    check_resumed(tmp_path, monkeypatch)


@pytest.mark.slow
def test_two_training_processes_have_a_sampling_process_each(tmp_path):
    """Each samples its own share, and a checkpoint of both continues on one process."""
    pytest.importorskip("ray", reason="the optional extra [ray]")

    def started(folder, *given):
        command = [sys.executable, "train.py", *TINY, *RL, *given, f"run_dir={tmp_path / folder}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)

    for folder, given in (("alone", []), ("lag", ["stages.rl.rollouts.lag=0"])):
        done = started(folder, "fabric.devices=2", *given)
        assert done.returncode == 0, done.stdout + done.stderr
    assert numbers(tmp_path / "lag") == numbers(tmp_path / "alone")

    given = [*CORRECTED, "stages.rl.rollouts.lag=1", "checkpoint_minutes=0"]
    assert started("both", "fabric.devices=2", *given).returncode == 0
    whole = numbers(tmp_path / "both")
    saved = sorted((tmp_path / "both" / "checkpoints").glob("step_*"))
    within = [path.stem for path in saved if read_state(path)["rollouts"]]
    assert within, "a checkpoint holds rollouts that were asked for"
    (tmp_path / "both" / "summary.json").unlink()
    assert started("both", f"resume={within[-1]}", *given).returncode == 0
    for one, two in zip(numbers(tmp_path / "both"), whole, strict=True):
        for name, value in two.items():
            if isinstance(value, float):
                assert one[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_a_sampling_process_that_dies_is_one_error(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the optional extra [ray]")
    original = RemoteSampler.submit

    def dies(self, request, model):
        # Not of Ray's low priority: training waits for this process.
        assert ray.get(self.worker.__ray_call__.remote(lambda worker: os.nice(0))) == os.nice(0)
        ray.kill(self.worker)
        return original(self, request, model)

    monkeypatch.setattr(RemoteSampler, "submit", dies)
    with pytest.raises(ValueError, match="the process that samples rollouts has died .*resume"):
        train(config(tmp_path, *RL, "stages.rl.rollouts.lag=0"))
