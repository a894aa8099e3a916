"""Groups that are left out, dynamic sampling, and RL stages with everything switched on."""

import itertools

import pytest
import torch
from helpers import config, records, rollouts, tiny_model
from torch._dynamo.testing import CompileCounter

import mtp.groups as groups
from mtp.groups import choose, join_rewards, join_rollouts, merged, shares
from mtp.modeling.compiled import CompiledPasses, Compiler
from mtp.modeling.versions import ASKS_FOR_QUERIES
from mtp.rollouts.reward import Rewards
from mtp.rollouts.rollout import Rollouts
from mtp.tasks.base import Example
from mtp.trainer import train
from mtp.training.stage import RolloutsConfig

FEW = ["kernels=torch", "stages.rl.steps=2", "stages.rl.evaluate_every=0"]
RL_ONLY = ["stages.head.steps=0", "stages.joint.steps=0", "stages.main.steps=2"]


def test_rollouts_of_several_rounds_keep_their_text():
    model = tiny_model()
    parts = []
    for seed in (0, 5):
        prompts, out, _ = rollouts(model, seed)
        examples = [Example(f"{seed}/{i}", "") for i in range(2)]
        parts.append(Rollouts(examples, 2, prompts, out))
    joined = join_rollouts(parts)
    for part, at in zip(parts, (0, 4), strict=True):
        for row in range(4):
            assert joined.completion(at + row) == part.completion(row)
            assert joined.example(at + row) == part.example(row)
            assert joined.prompts[at + row] == part.prompts[row]
    zeros = Rewards(*[torch.zeros(2, 2)] * 3, {"passes": torch.zeros(2, 2)})
    ones = Rewards(*[torch.ones(1, 2)] * 3, {"passes": torch.ones(1, 2)})
    joined = join_rewards([zeros, ones])
    assert joined.terms["passes"].tolist() == [[0, 0], [0, 0], [1, 1]]
    assert joined.credits.tolist() == [[0, 0], [0, 0], [1, 1]]


def test_informative_groups_are_chosen_and_filled_up_to_the_number_of_steps():
    stage = RolloutsConfig(num_prompts=4, num_minibatches=2, drop_uninformative=True, max_rounds=2)

    def chosen(*informs):
        return choose(stage, dict(enumerate(informs)))

    assert chosen(False, True, False, False) == [1, 0]
    assert chosen(True, False, True, True) == [0, 2, 3]
    assert chosen(True, False, True, True, False, True, True, True) == [0, 2, 3, 5]
    assert chosen(False, False, False, False) == []
    stage.drop_uninformative = False
    assert chosen(False, True, False, False) == [0, 1, 2, 3]


def test_groups_of_all_processes_are_chosen_in_the_order_of_their_places():
    parts = [{0: True, 2: False, 4: True}, {1: False, 3: True, 5: True}]
    assert list(merged(parts)) == [0, 1, 2, 3, 4, 5]
    stage = RolloutsConfig(num_prompts=2, drop_uninformative=True, max_rounds=3)
    assert choose(stage, merged(parts)) == [0, 3]


def test_shares_differ_by_one_at_most():
    assert shares([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4, 5]]
    assert shares([7], 2) == [[], [7]]


def outcomes_in_turn(*rows):
    """A fake `score`: the outcomes of each call's groups, all right, all wrong or mixed."""
    turn = itertools.cycle(rows)
    kinds = {"mixed": [1.0, 0.0, 0.0, 1.0], "wrong": [0.0] * 4, "right": [1.0] * 4}

    def give_rewards(task, text, sampled, settings, **others):
        outcomes = torch.tensor([kinds[kind] for kind in next(turn)])
        return Rewards(outcomes, outcomes, outcomes, {})

    return give_rewards


def rl_records(folder):
    return [r for r in records(folder) if r["stage"] == "rl" and "reward" in r]


def test_dynamic_sampling_goes_on_until_there_are_enough_groups(tmp_path, monkeypatch):
    first, second = ("mixed", "wrong", "right", "wrong"), ("mixed", "mixed", "wrong", "mixed")
    monkeypatch.setattr(groups, "score", outcomes_in_turn(first, second))
    more = [
        "stages.rl.steps=1",
        "stages.rl.rollouts.drop_uninformative=true",
        "stages.rl.rollouts.max_rounds=3",
    ]
    train(config(tmp_path, *RL_ONLY, *more))
    (record,) = rl_records(tmp_path)
    assert record["groups/sampled"] == 8, "two rounds of four prompts: the third was not needed"
    assert record["groups/informative"] == record["groups/used"] == 4
    assert record["reward"] == pytest.approx((4 * 0.5 + 1) / 8), "over all that was sampled"
    assert record["frac_reward_zero_std"] == 0.5


def test_groups_without_advantage_cost_no_replay_and_a_step_may_have_none(tmp_path, monkeypatch):
    one, none = ("wrong", "mixed", "right", "wrong"), ("wrong", "wrong", "right", "wrong")
    monkeypatch.setattr(groups, "score", outcomes_in_turn(one, none))
    more = ["stages.rl.steps=2", "stages.rl.rollouts.drop_uninformative=true"]
    train(config(tmp_path, *RL_ONLY, *more))
    first, second = rl_records(tmp_path)
    assert first["groups/used"] == 1 and second["groups/used"] == 0
    assert first["num_tokens/policy_main"] < 4 * first["passes"] * 4
    assert "loss" in first and "loss" not in second, "nothing to learn from: no optimizer step"


def test_every_setting_of_rl_at_once_takes_its_steps(tmp_path):
    overrides = [
        "stages.rl.rollouts.num_minibatches=2",
        "stages.rl.rollouts.recompute_old=true",
        "stages.rl.objective.policy.correction_cap=2.0",
        "stages.rl.objective.policy.ratio=block",
        "stages.rl.objective.reference_kl.kind=k3",
        "stages.rl.objective.preserve.weight=0.1",
        "stages.rl.objective.main_ce.weight=0.1",
        "stages.rl.objective.head_kl.weight=0.1",
        "stages.rl.rollouts.num_solved=3",
        "stages.rl.channel_ramp_steps=3",
        "stages.rl.logits_detach=true",
        "stages.rl.reference=start",
        "stages.rl.steps=2",
    ]
    summary = train(config(tmp_path, *RL_ONLY, *overrides))
    record = rl_records(tmp_path)[-1]
    for name in ("loss/main_ce", "loss/head_kl", "loss/reference_kl_head", "loss/preserve"):
        assert record[name] >= 0.0, name
    assert "supervised/main/accuracy" in record
    assert (tmp_path / "start" / "config.json").is_file()
    assert summary["stages"][-1]["reference_in_loss"] is False


def test_the_auxiliary_policy_trains_the_head_on_what_main_wrote(tmp_path):
    overrides = [
        "stages.rl.rollouts.mode=slow",
        "stages.rl.rollouts.recompute_old=true",
        "stages.rl.steps=1",
    ]
    train(config(tmp_path, *RL_ONLY, *overrides))
    (record,) = rl_records(tmp_path)
    assert record["passes"] == record["completions/mean_length"], "slow: a token a pass"
    assert record["num_tokens/policy_head"] > record["num_tokens/policy_main"]
    assert record["head/clip_ratio"] == 0.0, "ratios are taken to the head's own probabilities"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.rl.reference=joint", "stages.rl.reference must be previous, first, start or"),
        ("evaluation.reference=nowhere", "evaluation.reference must be first, start, a stage"),
        ("evaluation.reference=runs/nowhere", "got .runs/nowhere., not found in /"),
    ],
)
def test_references_that_will_not_be_there_are_refused_at_once(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path / "run", *RL_ONLY, override))
    assert not (tmp_path / "run").exists()


def test_rl_alone_is_held_to_what_it_began_from(tmp_path):
    train(config(tmp_path / "warm", "stages.joint.steps=0", "stages.rl.steps=0"))
    source = tmp_path / "warm" / "stages" / "head"
    other = tmp_path / "warm" / "stages" / "main"
    alone = ["stages.main.steps=0", "stages.head.steps=0", "stages.joint.steps=0"]
    settings = [
        f"model.source={source}",
        "stages.rl.reference=start",
        f"evaluation.reference={other}",
        "stages.rl.steps=1",
    ]
    summary = train(config(tmp_path / "rl", *alone, *settings))
    (stage,) = summary["stages"]
    assert stage["reference_in_loss"] is False and stage["reference_nats_per_token"] > 0
    record = rl_records(tmp_path / "rl")[0]
    assert record["main/kl"] == pytest.approx(0.0, abs=1e-4), "the first step is at the reference"


@pytest.mark.skipif(not ASKS_FOR_QUERIES, reason="transformers before 5.14 cannot compile passes")
def test_a_run_with_compiled_passes_logs_the_same_numbers(tmp_path, monkeypatch):
    torch._dynamo.reset()
    counter, shapes, forward = CompileCounter(), [], CompiledPasses._forward

    def counted(passes, tokens, starts, with_taps):
        shapes.append((*tokens.shape, passes.cache.capacity, with_taps))
        return forward(passes, tokens, starts, with_taps)

    monkeypatch.setattr(CompiledPasses, "_forward", counted)
    monkeypatch.setattr("mtp.rollouts.rollout.Compiler", lambda: Compiler(backend=counter))
    logged = []
    for compiles in ("false", "true"):
        folder = tmp_path / compiles
        train(config(folder, *RL_ONLY, f"decoding.compile_passes={compiles}", *FEW))
        numbers = [
            {name: value for name, value in record.items() if isinstance(value, float)}
            for record in records(folder)
        ]
        logged.append(numbers)
    assert len(logged[0]) == len(logged[1]) > 4
    for expected, record in zip(*logged, strict=True):
        assert record == pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True)
    # Weights change, and batches: a graph is made for a shape and for nothing else.
    assert shapes.pop(0) == (1, 2, 64, True)  # the check at build, by a backend of its own
    assert counter.frame_count == len(set(shapes)) < len(shapes) / 10
    torch._dynamo.reset()
