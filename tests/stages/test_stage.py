"""A stage's end: weights that are not finite, and processes that disagree about an early end."""

from types import SimpleNamespace

import pytest
import torch
from helpers import config

import mtp.stages.evaluation as evaluation
import mtp.stages.loop as loop
from mtp.trainer import train
from mtp.training.runtime import NotFinite


def test_a_weight_that_is_not_finite_is_named_with_stage_and_step(tmp_path, monkeypatch):
    original = loop.step_batches

    def poison(run, stage, step):
        if stage.name == "rl" and step == 1:
            with torch.no_grad():
                run.model.model.norm.weight[0] = torch.nan
        return original(run, stage, step)

    monkeypatch.setattr(loop, "step_batches", poison)
    message = "^stage rl, step 2: the weight model.norm.weight is not finite; lower the learning"
    with pytest.raises(NotFinite, match=message):
        train(config(tmp_path, "stages.head.steps=0", "stages.joint.steps=0"))


@pytest.mark.parametrize(("other", "ends"), [(1.0, True), (0.0, False)])
def test_a_stage_ends_early_only_if_all_processes_agree(monkeypatch, tmp_path, other, ends):
    """Ranks that disagree would wait for each other for ever."""

    def all_reduce(mine, reduce_op):
        assert reduce_op == "min"
        return torch.minimum(mine, torch.tensor([other], dtype=mine.dtype))

    fabric = SimpleNamespace(world_size=2, device="cpu", all_reduce=all_reduce)
    settings = config(tmp_path, "stages.joint.stop_accuracy=0.5", "stages.joint.stop_every=1")
    run = SimpleNamespace(
        fabric=fabric,
        config=settings,
        progress=SimpleNamespace(step=1, position=0),
        task=settings.task.build(),
        fmt=None,
    )
    stage = SimpleNamespace(config=settings.stages["joint"], module=None)
    monkeypatch.setattr(evaluation, "fast_accuracy", lambda *given: 0.75)
    monkeypatch.setattr(evaluation, "within", lambda module, function: function(None))
    assert evaluation.has_learned(run, stage) is ends
