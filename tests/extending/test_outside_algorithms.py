"""Algorithms from outside the package: each is a function or two and one line that names it."""

import math

import pytest
import torch

from mtp.rollouts.advantage import ADVANTAGES, GroupRewards, where_informative
from mtp.training.algorithms import ALGORITHMS, Algorithm, PolicyTokens
from mtp.training.objectives.policy import Policy


def over_mean(given: GroupRewards) -> torch.Tensor:
    """MaxRL: (r - mean) / mean, so that rare successes count more."""
    mean = given.rewards.mean(1, keepdim=True)
    return where_informative(given, (given.rewards - mean) / (mean + 1e-6))


def within_probabilities(tokens: PolicyTokens) -> torch.Tensor:
    """A trust region on probabilities: no gradient where |p - p_old| has grown past the clip."""
    moved = (tokens.logprob.exp() - tokens.old.exp()).detach()
    is_out = ((tokens.advantage > 0) & (moved > tokens.clip_high)) | (
        (tokens.advantage < 0) & (moved < -tokens.clip_low)
    )
    return torch.where(is_out, 0.0, tokens.ratio * tokens.advantage)


MAX_RL = ALGORITHMS.add("max_rl", Algorithm(advantage=over_mean, surrogate=within_probabilities))
ADVANTAGES.add("over_mean", over_mean)


def test_an_algorithm_from_outside_is_chosen_by_name():
    policy = Policy(weight=1.0, algorithm="max_rl", ratio="block", clip_high=0.5)
    policy.validate("policy")
    rules = policy.rules()
    assert rules.advantage is over_mean and rules.surrogate is within_probabilities
    assert policy.clips() == {"main": (0.2, 0.5), "head": (0.2, 0.5)}
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    got = rules.advantage(GroupRewards(rewards, rewards, rewards))
    assert torch.allclose(got, torch.tensor([[3.0, -1.0, -1.0, -1.0]]), atol=1e-4)


def test_a_surrogate_reads_probabilities():
    logprob = torch.tensor([0.9, 0.3]).log().requires_grad_(True)
    old = torch.tensor([0.5, 0.25]).log()
    ones = torch.ones(2)
    given = PolicyTokens(logprob, old, 0 * ones, (logprob - old).exp(), ones, 0.2, 0.2)
    within_probabilities(given).sum().backward()
    assert logprob.grad[0] == 0.0, "0.4 likelier than before"
    assert math.isclose(float(logprob.grad[1]), 1.2, rel_tol=1e-5)


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="'max_rl' is registered already; choose another name"):
        ALGORITHMS.add("max_rl", Algorithm())
    assert ALGORITHMS.add("max_rl", MAX_RL) is MAX_RL
