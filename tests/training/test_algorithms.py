"""Policy-gradient algorithms, worked by hand on five tokens of two rollouts.

    rollout 0, advantage 1:   block (main 1.5, head 2.0, head 1.0), block (main 0.5)
    rollout 1, advantage -1:  block (main 1.1, head 0.9)

The numbers are ratios p / p_old of the tokens; p_old is the sampler's unless a test says otherwise.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mtp.rollouts.advantage import ADVANTAGES, GroupRewards, batch_std
from mtp.training.algorithms import ALGORITHMS, RATIOS
from mtp.training.batch import PolicyRows, RolloutBatch
from mtp.training.objectives.policy import Policy
from mtp.training.objectives.scored import RowStats
from mtp.training.objectives.stream import StreamInputs

MAIN, HEAD = [1.5, 0.5, 1.1], [2.0, 1.0, 0.9]
GIVEN = torch.tensor([1.0, -1.0])


def batch(correction: float = 1.0) -> RolloutBatch:
    """The example; `correction` is p_old / p_sampled of every token."""
    ids = torch.tensor
    old = torch.full((3,), math.log(0.1))
    of_rollouts = {
        "rollouts": ids([0, 0, 1]),
        "advantages": GIVEN[[0, 0, 1]],
        "sampled": old - math.log(correction),
        "old": old,
    }
    return RolloutBatch(
        tokens=ids([[9, 1, 2, 3, 4], [9, 5, 6, 0, 0]]),
        anchors=ids([0, 5]),
        slot_inputs=ids([[1, 2], [5, 6]]),
        main=PolicyRows(
            positions=ids([0, 3, 5]),
            slots=ids([0, 0, 0]),
            targets=ids([1, 4, 5]),
            outputs=ids([0, 3, 5]),
            **of_rollouts,
        ),
        head=PolicyRows(
            positions=ids([1, 2, 6]),
            slots=ids([1, 2, 1]),
            targets=ids([2, 3, 6]),
            outputs=ids([0, 1, 2]),
            **of_rollouts,
        ),
    )


def run(policy: Policy, correction: float = 1.0, given: RolloutBatch | None = None, main=MAIN):
    """(loss, gradient on main's three log-probabilities, on the head's, metrics)."""
    example = batch(correction) if given is None else given
    stats, leaves = {}, {}
    for name, ratios in (("main", main), ("head", HEAD)):
        leaf = (torch.tensor(ratios) * 0.1).log().requires_grad_(True)
        stats[name] = RowStats(leaf, torch.zeros(3))
        leaves[name] = leaf
    policy.validate("policy")
    terms = policy.terms(StreamInputs(SimpleNamespace(stats=lambda sampler: stats), example))
    counts = policy.counts(example)
    loss = sum(t.weight * t.total / counts[n] for n, t in terms.items())
    loss.backward()
    metrics = {k: float(s) / int(n) for t in terms.values() for k, (s, n) in t.metrics.items()}
    maxima = {k: float(v) for t in terms.values() for k, v in t.maxima.items()}
    return float(loss.detach()), leaves["main"].grad, leaves["head"].grad, metrics | maxima


def close(got: torch.Tensor, expected: list[float]) -> bool:
    return torch.allclose(got, torch.tensor(expected), atol=1e-5)


def test_dapo_clips_higher_and_counts_tokens_of_each_emitter():
    loss, main, head, metrics = run(Policy(weight=1.0, algorithm="dapo"))
    # main: min(1.5, 1.28) + 0.5 - 1.1; the head: min(2, 1.28) + 1 - 0.9; three tokens each
    assert loss == pytest.approx(-(1.28 + 0.5 - 1.1) / 3 - (1.28 + 1.0 - 0.9) / 3, rel=1e-5)
    assert close(main, [0.0, -0.5 / 3, 1.1 / 3]) and close(head, [0.0, -1.0 / 3, 0.9 / 3])
    assert metrics["main/clip_ratio_high"] == pytest.approx(1 / 3)
    assert metrics["main/clip_ratio_low"] == 0.0
    assert metrics["head/sampling_logp_difference_max"] == pytest.approx(math.log(2), rel=1e-5)
    assert metrics["main/importance_sampling_ratio"] == pytest.approx(3.1 / 3, rel=1e-5)
    assert metrics["main/importance_sampling_ratio_max"] == pytest.approx(1.5, rel=1e-5)


def test_grpo_takes_the_mean_of_each_rollout_first():
    loss, main, head, _ = run(Policy(weight=1.0, algorithm="grpo"))
    assert loss == pytest.approx(
        -((1.2 + 0.5) / 2 - 1.1) / 2 - ((1.2 + 1.0) / 2 - 0.9) / 2, rel=1e-5
    )
    assert close(main, [0.0, -0.5 / 4, 1.1 / 2]) and close(head, [0.0, -1.0 / 4, 0.9 / 2])


def test_dr_grpo_divides_by_a_fixed_length():
    loss, main, _, _ = run(Policy(weight=1.0, algorithm="dr_grpo", length=10))
    assert loss == pytest.approx(-(1.2 + 0.5 - 1.1) / 20 - (1.2 + 1.0 - 0.9) / 20, rel=1e-5)
    assert close(main, [0.0, -0.5 / 20, 1.1 / 20])
    with pytest.raises(ValueError, match="policy.length must be the number of tokens"):
        Policy(algorithm="dr_grpo").validate("policy")


def test_rloo_has_one_ratio_for_all_of_a_rollout():
    # rollout 0: 1.5 * 2 * 1 * 0.5 = 1.5 is clipped; rollout 1: 1.1 * 0.9 = 0.99
    _, main, head, _ = run(Policy(weight=1.0, algorithm="rloo"))
    assert close(main, [0.0, 0.0, 0.99 / 2]) and close(head, [0.0, 0.0, 0.99 / 2])


def test_gspo_has_the_geometric_mean_of_a_rollouts_ratios():
    wide = Policy(weight=1.0, algorithm="gspo", clip_low=0.5, clip_high=0.5)
    first, second = 1.5 ** (1 / 4), 0.99 ** (1 / 2)
    loss, main, head, _ = run(wide)
    assert loss == pytest.approx(-(first - second) / 2 * 2, rel=1e-4)
    assert close(main, [-first / 4, -first / 4, second / 2])
    assert close(head, [-first / 4, -first / 4, second / 2])
    _, main, _, metrics = run(Policy(weight=1.0, algorithm="gspo"))
    assert close(main, [0.0, 0.0, 0.0]), "both rollouts have left the narrow range"
    assert metrics["main/clip_ratio_low"] == pytest.approx(1 / 3)


def test_a_block_is_clipped_as_one_action():
    # blocks: 1.5 * 2 * 1 = 3 (clipped, main's and the head's tokens alike), 0.5, 1.1 * 0.9 = 0.99
    _, main, head, _ = run(Policy(weight=1.0, ratio="block"))
    assert close(main, [0.0, -0.5 / 3, 0.99 / 3]) and close(head, [0.0, 0.0, 0.99 / 3])


def test_cispo_bounds_the_weight_and_drops_no_token():
    _, main, head, _ = run(Policy(weight=1.0, algorithm="cispo", clip_high=0.5))
    assert close(main, [-1.5 / 3, -0.5 / 3, 1.1 / 3]) and close(head, [-1.5 / 3, -1 / 3, 0.9 / 3])


@pytest.mark.parametrize("head_weight", [0.0, 1.0])
def test_tokens_that_the_head_only_scores_are_in_no_ratio_of_mains(head_weight):
    """Slow and verified rollouts: 1.5 * 0.5 = 0.75 and 1.1; the head has ratios of its own tokens,
    of which 2 is clipped.
    """
    scored = replace(batch(), head_samples=False)
    _, main, head, _ = run(Policy(weight=1.0, head_weight=head_weight, algorithm="rloo"), 1, scored)
    assert close(main, [-0.75 / 2, -0.75 / 2, 1.1 / 2])
    assert close(head, [0.0, -head_weight / 2, head_weight * 0.9 / 2])
    _, main, _, _ = run(Policy(weight=1.0, ratio="block", head_weight=head_weight), 1, scored)
    assert close(main, [0.0, -0.5 / 3, 1.1 / 3])


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "dr_grpo"])
def test_a_token_that_top_k_left_out_in_replay_has_ratio_0(algorithm):
    """Its group has ratio 0 too, so that of rollout 0 no token of main has a gradient."""
    policy = Policy(weight=1.0, algorithm=algorithm)
    loss, main, head, metrics = run(policy, main=[1.5, 0.0, 1.1])
    assert math.isfinite(loss) and bool(main.isfinite().all()) and bool(head.isfinite().all())
    assert float(main[1]) == 0.0 and all(map(math.isfinite, metrics.values()))
    differences = [math.log(1.5), math.log(1.1)]
    assert metrics["main/sampling_logp_difference_max"] == pytest.approx(max(differences), rel=1e-4)
    if policy.rules().ratio is not RATIOS.get("token", "ratio"):
        assert close(main[:2], [0.0, 0.0]) and close(head[:2], [0.0, 0.0])


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "dr_grpo"])
def test_a_token_that_was_impossible_before_the_update_teaches_nothing(algorithm):
    plain = batch()
    old = torch.tensor([math.log(0.1), -math.inf, math.log(0.1)])
    given = replace(plain, main=replace(plain.main, old=old))
    clips = {"clip_low": 0.9, "clip_high": 9.0, "correction_cap": 2.0}
    loss, main, head, _ = run(Policy(weight=1.0, algorithm=algorithm, **clips), given=given)
    assert math.isfinite(loss) and bool(main.isfinite().all()) and bool(head.isfinite().all())
    assert float(main[1]) == 0.0 and float(main[2]) != 0.0


def test_each_emitter_has_its_own_clip_range_and_weight():
    policy = Policy(weight=1.0, head_weight=0.5, head_clip_high=2.0)
    _, main, head, _ = run(policy)
    assert close(main, [0.0, -0.5 / 3, 1.1 / 3])
    assert close(head, [-0.5 * 2.0 / 3, -0.5 * 1.0 / 3, 0.5 * 0.9 / 3])


def test_a_truncated_importance_weight_corrects_for_another_sampler():
    _, plain, _, _ = run(Policy(weight=1.0))
    for correction, weight in ((1.4, 1.4), (5.0, 2.0), (0.25, 0.25)):
        _, main, _, metrics = run(Policy(weight=1.0, correction_cap=2.0), correction)
        assert torch.allclose(main, weight * plain, rtol=1e-4)
        assert metrics["main/importance_sampling_ratio_max"] == pytest.approx(
            1.5 * correction, rel=1e-4
        )


def test_unknown_choices_name_their_key():
    with pytest.raises(ValueError, match="policy.algorithm must be one of grpo, dapo"):
        Policy(algorithm="ppo").validate("policy")
    with pytest.raises(ValueError, match="policy.ratio must be one of null, token, block"):
        Policy(ratio="word").validate("policy")


@pytest.mark.parametrize("kind", ["token", "block", "sequence", "rollout"])
def test_ratios_are_one_and_their_gradients_equal_on_policy(kind):
    logprob = torch.randn(6).requires_grad_(True)
    blocks, rollouts = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    ratios = RATIOS.get(kind, "ratio")(logprob - logprob.detach(), blocks, rollouts)
    assert torch.equal(ratios, torch.ones(6))
    ratios.sum().backward()
    assert torch.equal(logprob.grad, torch.ones(6))


REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.1, 0.2, 0.2]])
OUTCOMES = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("group_mean", [0.5, -0.5, -0.5, 0.5]),
        ("group_std", [1.0, -1.0, -1.0, 1.0]),
        ("leave_one_out", [2 / 3, -2 / 3, -2 / 3, 2 / 3]),  # 1 - (0 + 0 + 1) / 3
    ],
)
def test_group_advantages_by_hand(kind, first):
    got = ADVANTAGES.get(kind, "kind")(GroupRewards(REWARDS, OUTCOMES, REWARDS))
    assert torch.allclose(got[0], torch.tensor(first), atol=1e-3)
    assert got[1].tolist() == [0.0] * 4, "a group in which nothing was solved teaches nothing"


def test_advantages_over_the_batch_keep_a_group_whose_outcomes_agree():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    got = batch_std(GroupRewards(rewards, rewards, rewards))
    assert torch.allclose(got, torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), atol=1e-3)
    elsewhere = torch.cat([rewards, torch.ones(2, 2)])  # another process had a right group
    got = batch_std(GroupRewards(rewards, rewards, elsewhere))
    assert torch.allclose(got, (rewards - 3 / 4) / (3 / 16) ** 0.5, atol=1e-3)


def test_every_algorithm_is_made_of_known_parts():
    for name in ALGORITHMS:
        Policy(algorithm=name, length=1).validate("policy")
        rule = ALGORITHMS.get(name, "algorithm").advantage
        assert rule(GroupRewards(REWARDS, OUTCOMES, REWARDS)).shape == REWARDS.shape
