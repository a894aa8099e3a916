"""Numbers that are watched: NaN stops or is left out, and a sampler that replay disagrees with."""

from types import SimpleNamespace

import pytest
import torch
from helpers import config, records
from transformers import LlamaConfig

import mtp.stages.loop as loop
from mtp.hub.checkpoint import read_state
from mtp.trainer import train
from mtp.training.numbers import NumbersConfig, sampler_warning
from mtp.training.runtime import NotFinite

JOINT = [
    "stages.main.steps=0",
    "stages.head.steps=0",
    "stages.joint.steps=3",
    "stages.joint.evaluate_every=0",
    "stages.rl.steps=0",
]


def poisoned(monkeypatch, *steps):
    """The head's gradient is NaN in these steps, counted from 0."""
    original = loop.take_update

    def take(run, stage, step, batches, **given):
        if step not in steps:
            return original(run, stage, step, batches, **given)
        weight = next(run.model.mtp_head.parameters())
        handle = weight.register_hook(lambda gradient: gradient * torch.nan)
        try:
            return original(run, stage, step, batches, **given)
        finally:
            handle.remove()

    monkeypatch.setattr(loop, "take_update", take)


def test_a_gradient_that_is_not_finite_stops_the_run_and_its_batch_is_saved(tmp_path, monkeypatch):
    poisoned(monkeypatch, 1)
    with pytest.raises(NotFinite, match="^stage joint, step 2: the gradient of head is not fin"):
        train(config(tmp_path, *JOINT))
    (path,) = (tmp_path / "not_finite").iterdir()
    assert path.name == "joint_step_000002_process_0.safetensors"
    state = read_state(path)
    assert (state["stage"], state["step"]) == ("joint", 2)
    assert state["cause"] == "the gradient of head is not finite"
    (batch,) = state["batches"]
    assert batch["tokens"].shape[0] == 64 and len(batch["main"]["targets"]) > 64


def test_such_a_step_can_be_left_out(tmp_path, monkeypatch):
    poisoned(monkeypatch, 1)
    train(config(tmp_path, *JOINT, "numbers.not_finite=skip"))
    steps = [r for r in records(tmp_path) if r["stage"] == "joint" and "skipped" in r]
    assert [record["skipped"] for record in steps] == [0.0, 1.0, 0.0]
    assert "loss" not in steps[1] and steps[2]["loss"] > 0


def test_too_many_such_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    poisoned(monkeypatch, 0, 1, 2)
    with pytest.raises(NotFinite, match="^stage joint, step 2: the gradient of head"):
        train(config(tmp_path, *JOINT, "numbers.not_finite=skip", "numbers.max_skipped=2"))
    assert len(list((tmp_path / "not_finite").iterdir())) == 2


def test_steps_left_out_in_a_row_are_counted_over_a_stop(tmp_path, monkeypatch):
    poisoned(monkeypatch, 0, 1, 2)
    skip = ("numbers.not_finite=skip", "numbers.max_skipped=2", "checkpoint_minutes=1e-9")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "check_grace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path, *JOINT, *skip))
    with pytest.raises(NotFinite, match="^stage joint, step 2: the gradient of head"):
        train(config(tmp_path, *JOINT, *skip, "resume=true"))


def test_a_choice_that_is_none_is_refused():
    with pytest.raises(ValueError, match="numbers.not_finite must be stop or skip, got 'ignore'"):
        NumbersConfig(not_finite="ignore").validate()


@pytest.mark.parametrize(
    ("dropout", "precision", "cause"),
    [
        (0.1, "bf16-mixed", "replay runs with the model's attention_dropout=0.1"),
        (0.0, "bf16-mixed", "fabric.precision=bf16-mixed rounds the two differently"),
        (0.0, "32-true", "neither dropout nor precision explains it"),
    ],
)
def test_a_sampler_that_replay_disagrees_with_is_named_with_its_cause(dropout, precision, cause):
    model = SimpleNamespace(config=LlamaConfig(attention_dropout=dropout))
    metrics = {"main/sampling_logp_difference": 0.01, "head/sampling_logp_difference": 0.2}
    found = sampler_warning(metrics, ["main", "head"], 0.05, model, precision)
    assert found is not None and cause in found
    assert found.startswith("log-probabilities of head's tokens differ by 0.2 nats on average")
    assert sampler_warning(metrics, ["main"], 0.05, model, precision) is None
    assert sampler_warning(metrics, ["main", "head"], 0.3, model, precision) is None
