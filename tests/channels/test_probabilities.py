"""Log-probabilities of thoughts: sampler against replay, densities, and the policy gradient."""

import itertools
import math

import pytest
import torch
from torch import nn

from mtp.channels import WriteOptions, build_channel
from mtp.channels.multiplex import Multiplex, MultiplexOptions
from mtp.channels.soft import Soft, SoftOptions
from mtp.channels.vectors import split_off
from mtp.modeling.sampler import Sampler


@pytest.mark.parametrize("name", ["soft", "multiplex", "gated"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_replay_agree(name, temperature, built, task):
    """Thoughts of several lengths after several prompts: one forward gives each pass's number."""
    model, fmt = built
    channel = build_channel(name, {}, model)
    sampler = Sampler(temperature=temperature)
    options = WriteOptions(sampler=sampler, sample_answer=True, max_new_tokens=24, seed=3)
    prompts = [fmt.prompt_ids(task.example("train", i).prompt) for i in range(24)]
    with torch.no_grad():  # so that thoughts end after a few passes
        model.lm_head.weight[fmt.delimiter_id("</think>")] += 0.3
    rows = channel.rollouts(model, fmt, prompts, options)
    assert len({len(row.thought) for row in rows}) > 3
    assert any(len(row.text) > 1 for row in rows)
    log_probs, owners = channel.replay(model, fmt, rows, sampler)
    sampled = torch.tensor([value for row in rows for value in row.log_probs])
    assert torch.equal(owners, torch.tensor([b for b, r in enumerate(rows) for _ in r.log_probs]))
    assert torch.isfinite(sampled).all()
    assert ((log_probs - sampled).abs() / sampled.abs().clamp(min=1)).max() < 1e-4


@pytest.mark.parametrize("name", ["soft", "multiplex", "gated"])
def test_the_log_probability_has_a_gradient_on_main_and_on_the_channel(name, built, task):
    model, fmt = built
    channel = build_channel(name, {}, model)
    options = WriteOptions(sampler=Sampler(), sample_answer=True, max_new_tokens=8, seed=1)
    prompts = [fmt.prompt_ids(task.example("train", i).prompt) for i in range(8)]
    rows = channel.rollouts(model, fmt, prompts, options)
    channel.replay(model, fmt, rows, Sampler())[0].sum().backward()
    for key, parameter in [*model.named_parameters(), *channel.named_parameters()]:
        if not key.startswith("mtp_head."):
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), key


def test_the_density_of_a_noisy_soft_pass_integrates_to_one_with_its_end():
    """P(end) and the integral of the density over a grid of the plane sum to 1."""
    torch.manual_seed(0)
    embedding = nn.Embedding(5, 2).requires_grad_(False)
    channel = Soft(SoftOptions(noise=0.4), 2)
    logits = torch.randn(1, 5)
    log_end, log_go, log_q = split_off(logits, 1, Sampler())
    width = 0.02
    axis = torch.arange(-6, 6, width)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
    rows = len(points)
    density = channel.log_density(log_q.expand(rows, -1), embedding, None, points)
    inside = (log_go + density).exp().sum() * width**2
    assert float(inside) == pytest.approx(1 - float(log_end.exp()), abs=1e-4)
    mean = (density.exp()[:, None] * points).sum(0) * width**2
    assert torch.allclose(mean.float(), log_q.exp()[0] @ embedding.weight, atol=1e-3)


def test_soft_samples_have_the_mean_and_the_deviation_of_the_density():
    torch.manual_seed(0)
    embedding = nn.Embedding(6, 4)
    channel = Soft(SoftOptions(noise=0.5), 4)
    log_q = split_off(torch.randn(1, 6), 0, Sampler())[2].expand(20000, -1)
    found = channel.sample_thought(log_q, embedding, False, torch.Generator().manual_seed(0))
    mean = log_q[0].exp() @ embedding.weight
    deviation = 0.5 * embedding.weight.square().mean().sqrt()
    assert torch.allclose(found.record.mean(0), mean, atol=0.02)
    assert torch.allclose(found.record.std(0), deviation.expand(4), atol=0.02)


class Policy(nn.Module):
    """Two passes of a multiplex thought over three tokens, the last of which ends it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(3, 4)
        self.out = nn.Linear(4, 3)
        self.start = torch.randn(1, 4)

    def parts(self, before):
        return split_off(self.out(torch.tanh(before)), 2, Sampler())


def thoughts(policy, channel):
    """Every thought of at most two passes: (tokens of each pass, its log-probability)."""
    pairs = list(itertools.product(range(2), repeat=channel.options.num_tokens))
    log_end, log_go, log_q = policy.parts(policy.start)
    yield [], log_end[0]
    for first in pairs:
        ids = torch.tensor([first])
        total = log_go + channel.log_density(log_q, policy.embedding, ids, None)
        read = channel.vectors(policy.embedding, ids, None)
        end, go, q = policy.parts(policy.start + read)
        yield [first], (total + end)[0]
        for second in pairs:
            more = go + channel.log_density(q, policy.embedding, torch.tensor([second]), None)
            yield [first, second], (total + more)[0]


def reward_of(thought):
    """A number that depends on all tokens and on the length."""
    return math.sin(1 + sum((i + 1) * t for i, t in enumerate(itertools.chain(*thought))))


def test_the_multiplex_policy_gradient_is_that_of_the_enumerated_expectation():
    """Probabilities of all thoughts sum to 1, and E[reward * grad log p] over sampled thoughts
    approaches the gradient of the enumerated expected reward.
    """
    policy = Policy()
    channel = Multiplex(MultiplexOptions(num_tokens=2), 4)
    every = list(thoughts(policy, channel))
    assert len(every) == 1 + 4 + 16
    probabilities = torch.stack([log_p for _, log_p in every]).exp()
    assert float(probabilities.detach().sum()) == pytest.approx(1, abs=1e-5)
    rewards = torch.tensor([reward_of(thought) for thought, _ in every])
    parameters = list(policy.parameters())
    exact = torch.autograd.grad((probabilities * rewards).sum(), parameters)

    generator = torch.Generator().manual_seed(0)
    counts: dict[tuple, int] = {}
    with torch.no_grad():
        for _ in range(20000):
            before, thought = policy.start, []
            while len(thought) < 2:
                log_end, _, log_q = policy.parts(before)
                if float(torch.rand(1, generator=generator)) < float(log_end.exp()):
                    break
                found = channel.sample_thought(log_q, policy.embedding, False, generator)
                thought.append(tuple(found.ids[0].tolist()))
                before = policy.start + channel.vectors(policy.embedding, *found)
            counts[tuple(thought)] = counts.get(tuple(thought), 0) + 1
    log_ps = {tuple(thought): log_p for thought, log_p in thoughts(policy, channel)}
    sampled = sum(
        count / 20000 * reward_of(thought) * log_ps[thought] for thought, count in counts.items()
    )
    estimate = torch.autograd.grad(sampled, parameters)
    for name, a, b in zip(dict(policy.named_parameters()), exact, estimate, strict=True):
        assert float((a - b).norm()) < 0.06 * max(float(a.norm()), 0.1), name
