"""The two parts of main's policy gradient: by hand, as a sum, and without effect on a run."""

import pytest
import torch
from helpers import PAD, config, records, rollouts, tiny_model
from lightning.fabric import Fabric

from mtp.training.collate import collate_rollouts
from mtp.training.gradient_split import split_gradient, split_metrics
from mtp.training.objectives import ObjectiveConfig
from mtp.training.objectives.policy import Policy
from mtp.training.objectives.scored import replay_batch
from mtp.training.objectives.stream import StreamInputs
from mtp.training.optimizers import split_parameters
from mtp.training.step_module import wrap


def test_norms_and_cosine_by_hand():
    def split(own, channel):
        parts = {"own": own, "channel": channel}
        return split_metrics({name: [torch.tensor(v) for v in p] for name, p in parts.items()})

    assert split([[3.0], [4.0]], [[4.0], [-3.0]]) == {
        "norm_own": 5.0, "norm_channel": 5.0, "cosine": 0.0,
    }  # fmt: skip
    assert split([[1.0, 1.0]], [[-2.0, -2.0]])["cosine"] == pytest.approx(-1.0)
    assert split([[1.0]], [[0.0]])["cosine"] is None


@pytest.mark.parametrize("shared", [True, False])
def test_parts_add_up_to_the_policy_gradient_and_own_is_that_of_a_closed_channel(shared):
    model = tiny_model(shared_embeddings=shared)
    prompts, out, advantages = rollouts(model)
    batches = [
        collate_rollouts(prompts, out, advantages, segments, 4, PAD)
        for segments in ([0, 1], [2, 3])
    ]
    policy = Policy(weight=0.5, head_weight=3.0)
    fabric = Fabric(accelerator="cpu", devices=1)
    parts = split_gradient(fabric, wrap(fabric, model), batches, policy)
    assert all(p.grad is None for p in model.parameters())

    def gradients(channel_gradient):
        objective = ObjectiveConfig(policy=policy)
        counts = [objective.counts(batch, True) for batch in batches]
        for batch in batches:
            scored = replay_batch(model, batch, channel_gradient=channel_gradient, use_head=True)
            for name, term in objective.terms(StreamInputs(scored, batch), True).items():
                total = sum(count[name] for count in counts)
                (term.weight * term.total / total).backward(retain_graph=True)
        main = split_parameters(model)["main"].values()
        found = [p.grad.clone() for p in main]
        model.zero_grad()
        return found

    for expected, own, channel in zip(gradients(1.0), *parts.values(), strict=True):
        assert torch.allclose(own + channel, expected, atol=1e-6)
    for expected, own in zip(gradients(0.0), parts["own"], strict=True):
        assert torch.allclose(own, expected, atol=1e-6)
    assert split_metrics(parts)["norm_channel"] > 1e-3


def test_a_run_that_measures_trains_as_one_that_does_not(tmp_path):
    from mtp.trainer import train

    given = ["stages.main.steps=2", "stages.head.steps=1", "stages.joint.steps=0",
             "stages.rl.steps=3", "decoding.max_new_tokens=12", "logger.thought_tokens=0",
             "logger.log_every=3"]  # fmt: skip
    train(config(tmp_path / "plain", *given))
    train(config(tmp_path / "measured", *given, "stages.rl.gradient_split_every=2"))
    plain, measured = (records(tmp_path / name) for name in ("plain", "measured"))
    extra = [r for r in measured if "main/grad_cosine" in r]
    assert [(r["stage"], r["step"]) for r in extra] == [("rl", 2)]
    assert extra[0]["main/grad_norm_own"] >= 0
    assert [r for r in measured if r not in extra] == plain


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.main.gradient_split_every=1", "must be 0 in a stage that is supervised"),
        ("stages.rl.train_main=false", "set stages.rl.train_main=true"),
    ],
)
def test_what_has_no_policy_gradient_of_main_is_refused(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, "stages.rl.gradient_split_every=2", override)
