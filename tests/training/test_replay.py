"""Replay: one parallel forward gives the sampler's log-probabilities, for every mode and head.

All tokens of a verified phase are scored as main's, and forced ones not at all.
"""

import pytest
import torch
from helpers import CLOSE, EOS, HEADS, PAD, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp.modeling.decode import decode
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.phases import PhasePlan
from mtp.modeling.records import FORCED, Decoded, pad
from mtp.modeling.sampler import Sampler
from mtp.training.collate import collate_rollouts
from mtp.training.objectives.policy import Policy
from mtp.training.objectives.scored import replay_batch
from mtp.training.objectives.stream import StreamInputs

MODELS = {
    (family, head, shared): tiny_model(family, type=head, shared_embeddings=shared)
    for family in ("llama", "qwen3")
    for head in HEADS
    for shared in (True, False)
}


@settings(max_examples=40, deadline=None)
@given(
    which=st.sampled_from(sorted(MODELS)),
    prompts=st.lists(st.lists(st.integers(3, 22), min_size=1, max_size=9), min_size=1, max_size=7),
    mode=st.sampled_from(["fast", "slow", "all fast", "verified", "sure", "closed"]),
    sampler=st.sampled_from(
        [
            Sampler(),
            Sampler(temperature=0.7),
            Sampler(temperature=1.3, top_p=0.9),
            Sampler(top_k=5),
            Sampler(temperature=0),
        ]
    ),
    kernels=st.sampled_from([None, "torch", "reference"]),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_replay_gives_the_samplers_log_probabilities(which, prompts, mode, sampler, kernels, seed):
    model = MODELS[which]
    plan = PhasePlan(
        keep={"slow": [1, 1], "all fast": [4, 4]}.get(mode, [4, 1]),
        opened_by=[None, CLOSE],
        eos_ids=[EOS],
        verified=[mode == "verified", False],
        min_probability=[0.5 if mode == "sure" else 0.0, 0.0],
        max_tokens=[6 if mode == "closed" else None, None],
    )
    tokens, lengths = pad(prompts, PAD)
    out = decode(
        model,
        tokens,
        lengths,
        plan,
        DecodeOptions(
            sampler=sampler,
            max_new_tokens=17,
            pad_id=PAD,
            generator=torch.Generator().manual_seed(seed),
            impl=kernels,
        ),
    )
    rows = list(range(len(prompts)))
    batch = collate_rollouts(prompts, out, torch.arange(len(prompts)).float(), rows, 4, PAD)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    main, head = scored.main.stats(sampler).logprob, scored.head.stats(sampler).logprob
    assert len(main) + len(head) == int((out.lengths - (out.slots == FORCED).sum(1)).sum())
    assert len(main) == int((out.slots == 0).sum())
    if mode in ("fast", "slow", "all fast", "sure"):
        assert len(main) == int(out.passes.sum())
    assert torch.allclose(main, batch.main.sampled, atol=1e-4)
    assert torch.allclose(head, batch.head.sampled, atol=1e-4)
    total = out.logprobs.sum()
    assert torch.allclose(main.sum() + head.sum(), total, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_micro_batches_hold_the_same_rows_as_one_batch(head, plan):
    model = tiny_model(type=head)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12], [4, 4]]
    tokens, lengths = pad(prompts, PAD)
    out = decode(
        model,
        tokens,
        lengths,
        plan,
        DecodeOptions(
            sampler=Sampler(),
            max_new_tokens=20,
            pad_id=PAD,
            generator=torch.Generator().manual_seed(3),
        ),
    )
    advantages = torch.tensor([1.0, 2.0, 3.0, 4.0])
    whole = collate_rollouts(prompts, out, advantages, [0, 1, 2, 3], 4, PAD)
    parts = [collate_rollouts(prompts, out, advantages, rows, 4, PAD) for rows in ([0, 1], [2, 3])]
    for emitter in ("main", "head"):
        for name in ("slots", "targets", "advantages", "sampled"):
            joined = torch.cat([getattr(getattr(part, emitter), name) for part in parts])
            assert torch.equal(joined, getattr(getattr(whole, emitter), name)), name


@pytest.mark.parametrize("ratio", ["token", "block", "sequence", "rollout"])
def test_rollouts_that_say_the_same_share_a_text_and_count_apart(ratio, plan):
    model = tiny_model()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    tokens, lengths = pad(prompts, PAD)
    out = decode(
        model,
        tokens,
        lengths,
        plan,
        DecodeOptions(
            sampler=Sampler(),
            max_new_tokens=20,
            pad_id=PAD,
            generator=torch.Generator().manual_seed(3),
        ),
    )
    copies = torch.tensor([0, 1, 0, 2, 0, 1])
    out = Decoded(**{name: value[copies] for name, value in vars(out).items()})
    out.logprobs = out.logprobs - 0.1 * torch.arange(6.0)[:, None] * (out.slots >= 0)
    prompts = [prompts[i] for i in copies]
    advantages = torch.tensor([1.0, 2.0, -3.0, 4.0, 0.5, -1.0])
    policy = Policy(weight=1.0, ratio=ratio, normalizer="sequences", clip_low=0.3, clip_high=0.3)

    def loss_of(groups: list[list[int]]) -> tuple[torch.Tensor, dict[str, float]]:
        total, counts = torch.zeros(()), dict.fromkeys(("policy_main", "policy_head"), 0.0)
        for rows in groups:
            batch = collate_rollouts(prompts, out, advantages, rows, 4, PAD)
            assert len(batch.tokens) == len({int(copies[row]) for row in rows})
            assert batch.num_rollouts == len(rows)
            scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
            terms = policy.terms(StreamInputs(scored, batch))
            total = total + sum(term.weight * term.total for term in terms.values())
            counts = {name: counts[name] + n for name, n in policy.counts(batch).items()}
        return total, counts

    together, counts = loss_of([[0, 1, 2, 3, 4, 5]])
    apart, counts_apart = loss_of([[row] for row in range(6)])
    assert counts == counts_apart
    assert torch.allclose(together, apart, rtol=1e-5)
    weight = model.model.layers[0].mlp.up_proj.weight
    gradient, expected = (torch.autograd.grad(x, weight)[0] for x in (together, apart))
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-5)
