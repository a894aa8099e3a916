"""Streams beside the policy: KL estimators, supervised replay, slow rollouts, schedules."""

import math

import pytest
import torch
from helpers import PAD, PLAN, SAMPLES, emitter, rollouts, tiny_model

from mtp.modeling.decode import decode
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.sampler import Sampler
from mtp.rollouts.reward import RewardConfig
from mtp.training.collate import collate_main_rollouts, collate_rollouts, collate_text
from mtp.training.objectives import ObjectiveConfig, StreamInputs
from mtp.training.objectives.head_ce import HeadCE
from mtp.training.objectives.main_ce import MainCE
from mtp.training.objectives.policy import Policy
from mtp.training.objectives.reference_kl import ReferenceKL, estimate
from mtp.training.objectives.scored import replay_batch
from mtp.training.stage import ExamplesConfig, RolloutsConfig, StageConfig


def test_estimators_of_the_reference_kl_by_hand():
    policy, reference = emitter([[0.5, 0.5]], [0]), emitter([[0.25, 0.75]], [0])
    k1 = estimate("k1", policy, reference, Sampler())
    assert k1.item() == pytest.approx(math.log(2), rel=1e-5)
    k3 = estimate("k3", policy, reference, Sampler())
    assert k3.item() == pytest.approx(0.5 + math.log(2) - 1, rel=1e-5)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_estimators_have_the_divergence_as_their_mean(kind):
    """Weighed by the sampler's probabilities, of temperature 0.5 as both distributions are."""
    p, q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.4, 0.4, 0.2])
    targets = [0, 1, 2]
    sampler = Sampler(temperature=0.5)
    values = estimate(
        kind, emitter([p.tolist()] * 3, targets), emitter([q.tolist()] * 3, targets), sampler
    )
    sharp_p, sharp_q = p**2 / (p**2).sum(), q**2 / (q**2).sum()
    divergence = (sharp_p * (sharp_p / sharp_q).log()).sum()
    assert (sharp_p * values).sum().item() == pytest.approx(divergence.item(), rel=1e-5)


def test_k1_has_the_gradient_of_the_divergence_as_its_mean():
    q = [[0.4, 0.4, 0.2]] * 3
    logits = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    p = logits.softmax(0)
    (p * (p.log() - torch.tensor(q[0]).log())).sum().backward()
    expected, logits.grad = logits.grad, None
    policy = emitter(q, [0, 1, 2])
    policy.hidden = logits.expand(3, 3)
    (p.detach() * estimate("k1", policy, emitter(q, [0, 1, 2]), Sampler())).sum().backward()
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_estimators_refuse_a_sampler_that_truncates():
    rows = emitter([[0.5, 0.5]], [0])
    with pytest.raises(ValueError, match="reference_kl.kind=k3 needs decoding.top_k=0"):
        estimate("k3", rows, rows, Sampler(top_k=1))


def test_in_an_rl_step_solved_examples_are_for_the_supervised_streams_alone():
    objective = ObjectiveConfig(
        main_ce=MainCE(weight=1.0),
        head_ce=HeadCE(weight=1.0, on_rollouts=True),
        policy=Policy(weight=1.0),
        reference_kl=ReferenceKL(weight=0.1),
    )
    prompts, out, advantages = rollouts(tiny_model())
    sampled = collate_rollouts(prompts, out, advantages, [0, 1, 2, 3], 4, PAD)
    solved = collate_text(SAMPLES, PLAN, 4, PAD)
    assert set(objective.streams(solved, in_rl=True)) == {"main_ce"}
    assert set(objective.streams(sampled, in_rl=True)) == {"head_ce", "policy", "reference_kl"}
    assert objective.counts(solved, in_rl=True) == {"main_ce": len(solved.main.positions)}
    assert set(ObjectiveConfig(main_ce=MainCE(weight=1.0)).streams(solved, in_rl=False)) == {
        "main_ce"
    }


def test_logits_detach_keeps_the_heads_gradient_off_the_output_matrix_and_opens_the_channel():
    for detach in (False, True):
        model = tiny_model()
        batch = collate_text(SAMPLES, PLAN, 4, PAD)
        scored = replay_batch(
            model, batch, channel_gradient=1.0, use_head=True, logits_detach=detach
        )
        HeadCE(weight=1.0).terms(StreamInputs(scored, batch))["head_ce"].total.backward()
        matrix = model.lm_head.weight.grad
        assert (matrix is None) == detach
        assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["slow", "verified"])
def test_rollouts_of_main_score_it_as_sampled_and_the_head_on_what_main_wrote(mode):
    model = tiny_model()
    prompts, _, advantages = rollouts(model)
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(p) for p in prompts], batch_first=True, padding_value=PAD
    )
    out = decode(
        model,
        tokens,
        torch.tensor([len(p) for p in prompts]),
        PLAN.as_slow() if mode == "slow" else PLAN.as_verified(4),
        DecodeOptions(
            sampler=Sampler(),
            max_new_tokens=12,
            pad_id=PAD,
            generator=torch.Generator().manual_seed(1),
        ),
    )
    assert bool((out.passes < out.lengths).any()) == (mode == "verified")
    batch = collate_main_rollouts(prompts, out, advantages, [2, 0], PLAN, 4, PAD)
    assert len(batch.main) == int(out.lengths[[2, 0]].sum())
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    assert torch.allclose(scored.main.stats().logprob, batch.main.sampled, atol=1e-4)
    # each head row carries main's log-probability of the same token of the flat text
    of_row = dict(
        zip((batch.main.positions + 1).tolist(), batch.main.sampled.tolist(), strict=True)
    )
    expected = [of_row[i + 1] for i in batch.head.positions.tolist()]
    assert batch.head.sampled.tolist() == pytest.approx(expected)
    assert torch.equal(batch.tokens.flatten()[batch.head.positions + 1], batch.head.targets)
    assert batch.main.advantages[batch.main.rollouts == 0].unique().tolist() == [0.5]
    assert batch.head.advantages[batch.head.rollouts == 1].unique().tolist() == [1.0]


def test_blocks_of_rollouts_hold_one_token_of_main_and_the_heads_after_it():
    prompts, out, advantages = rollouts(tiny_model())
    batch = collate_rollouts(prompts, out, advantages, [0, 1, 2, 3], 4, PAD)
    assert len(batch.blocks(batch.main).unique()) == len(batch.main) == int(out.passes.sum())
    assert set(batch.blocks(batch.head).tolist()) <= set(batch.blocks(batch.main).tolist())
    gap = batch.head.positions - batch.blocks(batch.head) % batch.tokens.numel()
    assert torch.equal(gap, batch.head.slots), "slot j lies j tokens behind its anchor"


def test_the_channel_opens_evenly():
    stage = StageConfig(channel_gradient=0.8, channel_ramp_steps=4)
    assert [stage.channel_gradient_at(step) for step in (0, 1, 2, 4, 9)] == pytest.approx(
        [0.16, 0.32, 0.48, 0.8, 0.8]
    )
    assert StageConfig().channel_gradient_at(0) == 1.0


def test_reinforce_pp_takes_one_rollout_per_prompt():
    """Its advantages compare the rollouts of a step, as in its paper."""
    policy = ObjectiveConfig(policy=Policy(weight=1.0, algorithm="reinforce_pp"))
    rollouts = RolloutsConfig(num_prompts=4, group_size=1)
    StageConfig(rollouts=rollouts, objective=policy).validate("x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rounds": 2}, "stages.x.rollouts.max_rounds=2 .*drop_uninformative=true"),
        ({"mode": "odd"}, "stages.x.rollouts.mode must be fast, slow or verified, got 'odd'"),
        (
            {"group_size": 1},
            "stages.x.rollouts.group_size must be at least 2, got 1: an advantage compares",
        ),
        ({"num_solved": 4}, "stages.x.rollouts.num_solved=4 examples are read by no stream"),
        (
            {"num_prompts": 3, "num_minibatches": 2},
            "stages.x.rollouts.num_minibatches must divide stages.x.rollouts.num_prompts=3, got 2",
        ),
        (
            {"drop_uninformative": True, "policy": {"algorithm": "reinforce_pp"}},
            "stages.x.rollouts.drop_uninformative=true .* which have an advantage under batch_std",
        ),
        ({"num_anchors": 4}, "stages.x.rollouts.num_anchors and block_anchors choose anchors of"),
        (
            {"mode": "slow", "reference_kl": {"weight": 1.0, "kind": "k1"}},
            "reference_kl.kind=k1 .* the head samples none with stages.x.rollouts.mode=slow",
        ),
        (
            {"mode": "verified", "reference_kl": {"weight": 1.0, "kind": "k3"}},
            "reference_kl.kind=k3 .*; use .*reference_kl.kind=full or head_weight=0",
        ),
    ],
)
def test_rollouts_that_contradict_each_other_name_their_keys(settings, message):
    settings = dict(settings)
    policy = Policy(weight=1.0, **settings.pop("policy", {}))
    kl = ReferenceKL(**settings.pop("reference_kl", {}))
    policy = ObjectiveConfig(policy=policy, reference_kl=kl)
    stage = StageConfig(rollouts=RolloutsConfig(**{"num_prompts": 4} | settings), objective=policy)
    with pytest.raises(ValueError, match=message):
        stage.validate("x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": ExamplesConfig()}, "either .*examples.batch_size or .* above 0, got neither"),
        ({"rollouts": RolloutsConfig(num_prompts=4)}, "stages.x must have either .*, got both"),
        (
            {"rollouts": RolloutsConfig(mode="slow")},
            "stages.x.rollouts.mode must be left at 'fast'",
        ),
        (
            {"reward": RewardConfig(pass_cost=0.1)},
            "stages.x.reward.pass_cost must be left at 0.0 in a stage that is sup",
        ),
        (
            {"objective": ObjectiveConfig(reference_kl=ReferenceKL(weight=1, kind="k3"))},
            "stages.x.objective.reference_kl reads rollouts, got a stage of solved examples",
        ),
        (
            {
                "examples": ExamplesConfig(),
                "rollouts": RolloutsConfig(num_prompts=4),
                "objective": ObjectiveConfig(head_ce=HeadCE(weight=1.0)),
            },
            "set stages.x.rollouts.num_solved above 0",
        ),
    ],
)
def test_a_stage_has_examples_or_rollouts_and_no_key_of_the_other(settings, message):
    given = {
        "examples": ExamplesConfig(batch_size=4),
        "objective": ObjectiveConfig(head_ce=HeadCE(weight=1)),
    }
    with pytest.raises(ValueError, match=message):
        StageConfig(**given | settings).validate("x")
