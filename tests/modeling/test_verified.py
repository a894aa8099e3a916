"""Verified mode keeps main's own tokens, or samples of its own distribution, in fewer passes."""

import itertools

import pytest
import torch
from helpers import CLOSE, EOS, HEADS, VOCABULARY, completions, head_rows, run, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp.modeling.phases import PhasePlan
from mtp.modeling.sampler import Sampler, verify

RAGGED = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [4, 4]] + [[i, 22 - i] for i in range(3, 15)]


def opinionated(*args, **kwargs):
    """A random model that mostly says 5, 6 or 7, so that main often agrees with its head."""
    model = tiny_model(*args, **kwargs)
    with torch.no_grad():
        model.lm_head.weight[5:8] *= 4
    return model


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kernels", [None, "torch"])
def test_greedy_verified_text_is_slow_text_in_fewer_passes(kernels, family, head, plan):
    model = opinionated(family, type=head)
    verified = run(model, RAGGED, plan.as_verified(4), impl=kernels)
    slow = run(model, RAGGED, plan.as_slow())
    assert completions(verified) == completions(slow)
    assert torch.allclose(verified.logprobs, slow.logprobs, atol=1e-5)
    assert torch.equal(verified.finished, slow.finished)
    num_accepted = (verified.accepted > 0).sum(1)
    assert num_accepted.sum() > 10
    # A pass yields its accepted drafts and one token of main's; the last may end at a draft.
    fewest = verified.lengths - num_accepted
    assert ((verified.passes == fewest) | (verified.passes == fewest + 1)).all()


def test_accepted_tokens_are_counted_by_the_slot_that_proposed_them(plan):
    out = run(opinionated(), RAGGED, plan.as_verified(4))
    for row in range(len(RAGGED)):
        before = 0
        for slot in out.accepted[row, : out.lengths[row]].tolist():
            assert slot in (0, before + 1)
            before = slot
    assert (out.slots[out.slots >= 0] == 0).all()


@torch.no_grad()
def reference(model, prompt, plan, limit):
    """Greedy text by the definition, one token or block at a time, without a cache."""
    context, phase = list(prompt), 0
    for token in prompt:
        phase = plan.opened_by.index(token) if token in plan.opened_by else phase
    while len(context) - len(prompt) < limit and context[-1] != EOS:
        hidden, taps = model.main_hidden(torch.tensor([context]))
        block = [int((hidden[0, -1] @ model.lm_head.weight.T).argmax())]
        for slot in range(model.block_size - 1):
            rows = head_rows(model, taps, torch.tensor([context]), block)
            logits = model.output_layers()[1].logits(rows[slot])
            if float(logits.softmax(-1).max()) < plan.min_probability[phase]:
                break
            block.append(int(logits.argmax()))
        keep = 1 if plan.verified[phase] else plan.keep[phase]
        for token in block[:keep]:
            context.append(token)
            if token == EOS or token in plan.opened_by:
                break
        if context[-1] in plan.opened_by:
            phase = plan.opened_by.index(context[-1])
    return context[len(prompt) :][:limit]


MODELS = {head: opinionated(type=head) for head in HEADS}


@settings(max_examples=15, deadline=None)
@given(
    head=st.sampled_from(sorted(MODELS)),
    requests=st.lists(
        st.tuples(
            st.lists(st.sampled_from([3, 4, 5, 6, 7, 8, CLOSE]), min_size=1, max_size=6),
            st.lists(st.sampled_from(["fast", "slow", "verified"]), min_size=3, max_size=3),
            st.lists(st.sampled_from([0.0, 0.3, 0.6]), min_size=3, max_size=3),
            st.integers(1, 3),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_each_row_of_a_mixed_batch_is_the_definition_of_its_own_modes(head, requests):
    plans = [
        PhasePlan(
            keep=[1 if mode == "slow" else 1 + k for mode in modes],
            opened_by=[None, CLOSE, 5],
            eos_ids=[EOS],
            verified=[mode == "verified" for mode in modes],
            min_probability=thresholds,
        )
        for _, modes, thresholds, k in requests
    ]
    prompts = [prompt for prompt, *_ in requests]
    out = run(MODELS[head], prompts, plans, max_new_tokens=15)
    for prompt, plan, mine in zip(prompts, plans, completions(out), strict=True):
        assert mine == reference(MODELS[head], prompt, plan, 15)


def chi_square_excess(seen, expected):
    """Number of standard deviations of chi-square above its mean; cells of under 5 are pooled."""
    small = expected < 5
    seen = torch.cat([seen[~small], seen[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    seen, expected = seen[expected > 0], expected[expected > 0]
    freedom = len(seen) - 1
    chi = ((seen - expected) ** 2 / expected).sum()
    return float((chi - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize(
    "sampler",
    [Sampler(), Sampler(temperature=0.6), Sampler(top_k=3), Sampler(top_p=0.7)],
    ids=["temperature 1", "temperature 0.6", "top-k", "top-p"],
)
def test_what_is_kept_of_drafts_and_drawn_after_them_follows_main(sampler):
    """Sequences of three tokens: two drafts that ignore each other, and main's token at the end."""
    number, size = 30_000, 5
    generator = torch.Generator().manual_seed(3)
    main = torch.randn(3, size, generator=generator)
    head = torch.randn(2, size, generator=generator)
    log_q = sampler.log_probs(head).expand(number, 2, size)
    drafts = sampler.choose(head.expand(number, 2, size), log_q, generator)
    logits = main.expand(number, 3, size)
    num_drafts = torch.full((number,), 2)
    out = verify(logits, drafts, num_drafts, log_q, sampler, generator)
    p = sampler.log_probs(main).exp()
    # The first token of every row is settled; the second where the first draft was kept.
    first = torch.where(out.num_accepted > 0, drafts[:, 0], out.token)
    went_on = out.num_accepted > 0
    second = torch.where(out.num_accepted > 1, drafts[:, 1], out.token)[went_on]
    third = out.token[out.num_accepted > 1]
    for place, tokens in enumerate([first, second, third]):
        seen = torch.bincount(tokens, minlength=size).float()
        assert chi_square_excess(seen, p[place] * len(tokens)) < 4
    assert 0 < len(third) < len(second) < number
    kept = out.num_accepted[:, None] > torch.arange(2)
    log_p = sampler.log_probs(main)
    assert torch.equal(out.logprobs[:, :2][kept], log_p[torch.arange(2), drafts][kept])
    at = out.num_accepted
    picked = out.logprobs.gather(1, at[:, None])[:, 0]
    assert torch.equal(picked, log_p[at, out.token])


@pytest.mark.parametrize(
    ("head", "sampler", "length", "threshold", "kernels"),
    [
        ("eavesdrop", Sampler(temperature=2), 2, 0.0, None),
        ("eavesdrop", Sampler(temperature=2, top_k=3), 4, 0.4, None),
        ("parallel", Sampler(temperature=1.5, top_p=0.4), 3, 0.0, None),
        ("parallel", Sampler(temperature=2, top_k=3), 4, 0.4, None),
        ("eavesdrop", Sampler(temperature=1.5), 2, 0.0, "torch"),
        ("parallel", Sampler(temperature=1.5), 3, 0.0, "reference"),
    ],
    ids=["hot", "top-k", "top-p", "parallel", "without logits", "parallel without logits"],
)
def test_verified_samples_follow_mains_distribution(head, sampler, length, threshold, kernels):
    """All texts of a few tokens against their exact probabilities under main."""
    number, model = 4000, MODELS[head]
    plan = PhasePlan([4], [None], verified=[True], min_probability=[threshold])
    prompts = [[9, 6, 8]] * number
    out = run(model, prompts, plan, sampler, max_new_tokens=length, impl=kernels)
    assert int((out.accepted > 0).sum()) > 300
    texts, log_p = torch.tensor([[9, 6, 8]]), torch.zeros(1)
    for _ in range(length):
        with torch.no_grad():
            next_log_p = sampler.log_probs(model(texts).logits[:, -1])
        following = torch.arange(VOCABULARY).repeat(len(texts))
        texts = torch.cat([texts.repeat_interleave(VOCABULARY, 0), following[:, None]], 1)
        log_p = (log_p[:, None] + next_log_p).flatten()
        texts, log_p = texts[log_p > -30], log_p[log_p > -30]
    key = VOCABULARY ** torch.arange(length)
    expected = torch.zeros(VOCABULARY**length).index_add(
        0, (texts[:, 3:] * key).sum(1), log_p.exp()
    )
    seen = torch.bincount((out.tokens * key).sum(1), minlength=len(expected)).float()
    assert chi_square_excess(seen, expected * number) < 4
    every = dict(zip(map(tuple, texts[:, 3:].tolist()), log_p.tolist(), strict=True))
    recorded = out.logprobs.sum(1).tolist()
    for ids, total in itertools.islice(zip(completions(out), recorded, strict=True), 200):
        assert abs(every[tuple(ids)] - total) < 1e-4


def test_a_phase_that_is_used_up_is_closed_by_force(plan):
    model = opinionated()
    for mode in ("fast", "slow", "verified"):
        budgeted = PhasePlan(
            keep=[1 if mode == "slow" else 4, 1],
            opened_by=[None, CLOSE],
            eos_ids=[EOS],
            verified=[mode == "verified", False],
            max_tokens=[7, None],
        )
        out = run(model, RAGGED * 2, budgeted, Sampler(temperature=1.5), max_new_tokens=20)
        forced = 0
        for row, ids in enumerate(completions(out)):
            slots = out.slots[row, : len(ids)].tolist()
            thought = ids[: ids.index(CLOSE)] if CLOSE in ids else ids
            assert len(thought) <= 7
            where = [i for i, slot in enumerate(slots) if slot == -2]
            assert where in ([], [7])
            if where:
                forced += 1
                assert ids[7] == CLOSE and float(out.logprobs[row, 7]) == 0.0
                assert all(slot == 0 for slot in slots[8:])
            else:
                assert CLOSE in ids[:8] or EOS in ids[:7]
        assert forced > 10, mode


def test_a_forced_token_costs_no_pass(plan):
    budgeted = PhasePlan([4, 1], [None, CLOSE], [EOS], max_tokens=[6, None])
    out = run(opinionated(), [[5, 6]], budgeted, max_new_tokens=7)
    assert out.slots.tolist() == [[0, 1, 2, 3, 0, 1, -2]]
    assert out.passes.tolist() == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": [5, 1]}, "the head writes k = 3 tokens a pass"),
        ({"opened_by": [None, 99]}, "phase token 99 is not in the model's vocabulary of 23"),
        ({"max_tokens": [None, 5]}, "max_tokens of phase 1 needs a phase after it"),
        ({"max_tokens": [0, None]}, "must be at least 1, got 0"),
    ],
)
def test_an_impossible_plan_is_refused_before_any_pass(change, message, monkeypatch):
    settings_ = {"keep": [4, 1], "opened_by": [None, CLOSE], "eos_ids": [EOS], **change}
    model = tiny_model()
    monkeypatch.setattr(type(model), "main_states", None)
    with pytest.raises(ValueError, match=message):
        run(model, RAGGED, PhasePlan(**settings_))


def test_plans_of_one_batch_share_their_delimiters(plan):
    other = PhasePlan([4, 1], [None, 5], [EOS])
    with pytest.raises(ValueError, match="same delimiters"):
        run(tiny_model(), [[5], [6]], [plan, other])
    with pytest.raises(ValueError, match=r"one per row \(2\), got 1"):
        run(tiny_model(), [[5], [6]], [plan])
