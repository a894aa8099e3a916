"""The pass loop: slow mode is `generate`, fast mode is its definition, cuts are as documented."""

import pytest
import torch
from helpers import CLOSE, EOS, HEADS, PAD, VOCABULARY, completions, head_rows, run, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from transformers import LogitsProcessorList, TopPLogitsWarper

from mtp.modeling import versions
from mtp.modeling.phases import PhasePlan
from mtp.modeling.sampler import Sampler

PHASES = [
    {"name": "thought", "mode": "fast", "opened_by": None},
    {"name": "answer", "mode": "slow", "opened_by": CLOSE},
]
RAGGED = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [4, 4]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_slow_mode_is_transformers_generate(family, attention, plan):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    out = run(model, RAGGED, plan.as_slow())
    assert len({tuple(c) for c in completions(out)}) == len(RAGGED)
    for prompt, mine in zip(RAGGED, completions(out), strict=True):
        stock = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        assert mine == stock[0, len(prompt) :].tolist()
    assert torch.equal(out.passes, out.lengths)


def plain_block(model, context, plan, phase):
    """One greedy block by the definition: no cache, one row, the head recomputed at every slot."""
    hidden, taps = model.main_hidden(torch.tensor([context]))
    block = [int((hidden[0, -1] @ model.lm_head.weight.T).argmax())]
    for slot in range(model.block_size - 1):
        rows = head_rows(model, taps, torch.tensor([context]), block)
        block.append(int((model.output_layers()[1].logits(rows[slot])).argmax()))
    kept = []
    for token in block[: plan.keep[phase]]:
        kept.append(token)
        if token in (*plan.delimiters, *plan.eos_ids):
            break
    return kept


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_fast_mode_is_its_definition(head, shared, seed, plan):
    model = tiny_model(type=head, shared_embeddings=shared, seed=seed)
    out = run(model, RAGGED, plan)
    for row, prompt in enumerate(RAGGED):
        context, phase, passes = list(prompt), 0, 0
        while len(context) - len(prompt) < 24 and context[-1] != EOS:
            kept = plain_block(model, context, plan, phase)
            context += kept
            passes += 1
            phase = 1 if kept[-1] == CLOSE else phase
        assert completions(out)[row] == context[len(prompt) :][:24]
        assert int(out.passes[row]) == passes


@settings(max_examples=200, deadline=None)
@given(
    block=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    phase=st.integers(0, 2),
)
def test_a_block_is_cut_after_its_first_delimiter_or_end(block, phase):
    plan = PhasePlan(keep=[6, 1, 3], opened_by=[None, 7, 8], eos_ids=[1, 9])
    expected = 0
    for token in block[: plan.keep[phase]]:
        expected += 1
        if token in (7, 8, 1, 9):
            break
    kept = plan.kept(torch.tensor([block]), torch.tensor([phase]))
    assert kept.tolist() == [expected]


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_the_phase_after_each_token_is_that_of_the_last_delimiter(tokens):
    plan = PhasePlan(keep=[6, 1, 3], opened_by=[5, 7, 8], eos_ids=[1])
    phase, expected = 0, []
    for token in tokens:
        phase = {5: 0, 7: 1, 8: 2}.get(token, phase)
        expected.append(phase)
    assert plan.phase_after(torch.tensor([tokens])).tolist() == [expected]


def test_no_token_of_a_slow_phase_is_the_heads(plan):
    sampler = Sampler(temperature=1.5)
    out = run(tiny_model(), RAGGED * 16, plan, sampler, max_new_tokens=40)
    after_close = 0
    for row, ids in enumerate(completions(out)):
        if CLOSE in ids:
            slots = out.slots[row, ids.index(CLOSE) + 1 : len(ids)]
            after_close += len(slots)
            assert (slots == 0).all()
    assert after_close > 50
    assert (out.slots > 0).sum() > 50


def test_the_prompt_decides_the_first_phase(plan):
    out = run(tiny_model(), [[5, CLOSE, 6], [5, 6, 7]], plan, Sampler(temperature=1.0))
    assert (out.slots[0, : out.lengths[0]] == 0).all()
    assert (out.slots[1] > 0).any()


def test_a_row_does_not_depend_on_its_neighbours(plan):
    together = completions(run(tiny_model(), RAGGED, plan))
    alone = [completions(run(tiny_model(), [prompt], plan))[0] for prompt in RAGGED]
    assert together == alone


def test_the_length_limit_cuts_a_block(plan):
    out = run(tiny_model(), RAGGED, plan, max_new_tokens=5)
    cut = [len(c) for c in completions(out)]
    assert max(cut) == 5
    assert out.finished.tolist() == [c[-1] == EOS for c in completions(out)]


def test_sampling_follows_its_log_probabilities():
    logits = torch.tensor([1.0, 0.5, -0.3, -2.0, 0.0]).expand(20000, 5)
    for sampler in (Sampler(), Sampler(temperature=0.5), Sampler(top_k=3), Sampler(top_p=0.7)):
        tokens, logprobs = sampler.sample(logits, torch.Generator().manual_seed(0))
        expected = sampler.log_probs(logits)[0].exp()
        seen = torch.bincount(tokens, minlength=5) / len(tokens)
        assert torch.allclose(seen, expected, atol=0.012)
        assert torch.allclose(logprobs.exp(), expected[tokens])


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = Sampler(top_p=0.75).log_probs(logits).exp()
    assert torch.allclose(kept, torch.tensor([0.625, 0.375, 0.0, 0.0]))
    kept = Sampler(top_k=3).log_probs(logits).exp()
    assert torch.allclose(kept, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_p_keeps_the_tokens_that_transformers_keeps_of_equal_ones(dtype):
    logits = 3 * torch.randn(50, 4000, generator=torch.Generator().manual_seed(0))
    logits = (8 + logits).to(dtype).float()
    kept = Sampler(top_p=0.9).log_probs(logits).isfinite()
    assert torch.equal(kept, TopPLogitsWarper(0.9)(None, logits).isfinite())


@pytest.mark.parametrize("settings_", [{"temperature": -1}, {"top_k": -2}, {"top_p": 0}])
def test_impossible_sampling_is_an_error_that_names_the_key(settings_):
    with pytest.raises(ValueError, match=next(iter(settings_))):
        Sampler(**settings_)


def test_generate_takes_left_padding_and_returns_what_decode_does(plan):
    model = tiny_model()
    model.generation_config.mtp_phases = PHASES
    width = max(map(len, RAGGED))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in RAGGED])
    mask = (ids != PAD).long()
    for mode, expected in (("fast", plan), ("slow", plan.as_slow())):
        out = model.generate(
            ids,
            attention_mask=mask,
            mtp_mode=mode,
            max_new_tokens=24,
            return_dict_in_generate=True,
        )
        wanted = run(model, RAGGED, expected)
        assert torch.equal(out.sequences[:, width:], wanted.tokens)
        assert torch.equal(out.slots, wanted.slots)
        assert torch.equal(out.passes, wanted.passes)
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(ids, mtp_mode="fast", num_beams=4)
    with pytest.raises(ValueError, match="mtp_mode"):
        model.generate(ids, mtp_mode="warp")
    assert int(out.sequences.max()) < VOCABULARY


@pytest.mark.parametrize("mode", ["fast", "slow", "verified"])
def test_sequences_of_one_prompt_are_those_of_the_prompt_repeated(mode, plan):
    model = tiny_model()
    plan = {"fast": plan, "slow": plan.as_slow(), "verified": plan.as_verified(4)}[mode]
    out = run(model, RAGGED, plan, Sampler(), num_return_sequences=3)
    expected = run(model, [prompt for prompt in RAGGED for _ in range(3)], plan, Sampler())
    assert completions(out) == completions(expected)
    assert torch.equal(out.slots, expected.slots)
    assert torch.allclose(out.logprobs, expected.logprobs, atol=1e-5)
    first, second = completions(run(model, RAGGED[:1], plan, Sampler(), num_return_sequences=2))
    assert first != second


def test_generate_returns_several_sequences_of_a_prompt():
    model = tiny_model()
    model.generation_config.mtp_phases = PHASES
    ids = torch.tensor([[5, 6], [8, 9]])
    out = model.generate(
        ids, mtp_mode="fast", do_sample=True, num_return_sequences=2, max_new_tokens=8
    )
    assert out.shape[0] == 4 and out[:, :2].tolist() == [[5, 6], [5, 6], [8, 9], [8, 9]]
    with pytest.raises(ValueError, match="num_return_sequences=2 greedy.*do_sample"):
        model.generate(ids, mtp_mode="fast", num_return_sequences=2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["fast", "slow", "verified"])
@pytest.mark.parametrize("prompts", [RAGGED, RAGGED[:1]], ids=["batch", "one"])
def test_a_static_cache_changes_nothing(mode, attention, prompts, plan):
    model = tiny_model()
    model.set_attn_implementation(attention)
    plan = {"fast": plan, "slow": plan.as_slow(), "verified": plan.as_verified(4)}[mode]
    expected, out = (run(model, prompts, plan, static_cache=static) for static in (False, True))
    assert completions(out) == completions(expected)
    assert torch.allclose(out.logprobs, expected.logprobs, atol=1e-5)


def test_attention_reads_one_length_of_a_static_cache():
    model = tiny_model()
    model.generation_config.mtp_phases = PHASES
    spans = []
    model.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, kwargs, out: spans.append(kwargs["past_key_values"].span),
        with_kwargs=True,
    )
    ids, given = torch.tensor([[5, 6, 7], [8, 9, 10]]), {"mtp_mode": "fast", "max_new_tokens": 16}
    model.generate(ids, **given, cache_implementation="static")
    assert len(spans) > 2 and set(spans) == {3 + 16 + 2 * model.block_size}
    spans.clear()
    model.generate(ids, **given)
    assert spans == sorted(set(spans))
    with pytest.raises(ValueError, match="cache_implementation must be dynamic or static"):
        model.generate(ids, **given, cache_implementation="quantized")


@pytest.mark.skipif(
    not versions.ASKS_FOR_QUERIES,
    reason="transformers before 5.14 reads the cache's length, so every pass is compiled again",
)
def test_a_compiled_main_is_compiled_once_for_each_width_of_a_static_cache():
    model = tiny_model()
    plan = PhasePlan([model.block_size], [None])
    expected = run(model, RAGGED[:1], plan, max_new_tokens=48)
    counter = CompileCounter()
    model.model.forward = torch.compile(
        model.model.forward, backend=counter, dynamic=False, fullgraph=True
    )
    out = run(model, RAGGED[:1], plan, max_new_tokens=48, static_cache=True)
    assert completions(out) == completions(expected) and int(out.passes) > 4
    assert counter.frame_count == 2  # the prompt of three tokens, and blocks of k + 1


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", ["fast", "slow", "verified"])
def test_tokens_drawn_without_logits(mode, head, shared, plan, monkeypatch):
    model = tiny_model(type=head, shared_embeddings=shared)
    plan = {"fast": plan, "slow": plan.as_slow(), "verified": plan.as_verified(4)}[mode]
    expected, greedy = (run(model, RAGGED, plan, impl=impl) for impl in (None, "torch"))
    assert completions(greedy) == completions(expected)
    assert torch.allclose(greedy.logprobs, expected.logprobs, atol=1e-5)
    # A row's noise is its own: neither the implementation nor the other rows have a say in it.
    out = run(model, RAGGED, plan, Sampler(), impl="torch")
    assert completions(out) == completions(run(model, RAGGED, plan, Sampler(), impl="reference"))
    alone = completions(run(model, RAGGED[:1], plan, Sampler(), impl="torch"))
    if mode == "verified" and "drafts" in head:  # the kernel verifies under one vocabulary
        assert completions(out) == completions(run(model, RAGGED, plan, Sampler()))
    else:
        assert completions(out)[0] == alone[0] != completions(expected)[0]
    monkeypatch.setattr("mtp.modeling.token_sampling.linear_sample", None)
    assert completions(run(model, RAGGED, plan, impl="auto")) == completions(expected)
    with pytest.raises(
        ValueError, match=r"impl=torch \(key kernels of a run\) needs the package mtp_kernels"
    ):
        run(model, RAGGED, plan, impl="torch")


def test_auto_samples_without_logits_from_large_vocabularies_on_a_cpu(plan, monkeypatch):
    model = tiny_model()
    logits, kernels = (
        completions(run(model, RAGGED, plan, Sampler(), impl=impl)) for impl in (None, "torch")
    )
    assert logits != kernels
    assert completions(run(model, RAGGED, plan, Sampler(), impl="auto")) == logits
    monkeypatch.setattr("mtp.modeling.token_sampling.MANY_TOKENS", model.config.vocab_size)
    assert completions(run(model, RAGGED, plan, Sampler(), impl="auto")) == kernels
    verified = plan.as_verified(4)
    logits = completions(run(model, RAGGED, verified, Sampler()))
    assert completions(run(model, RAGGED, verified, Sampler(), impl="auto")) == logits


def test_kernels_do_not_draw_where_distributions_are_asked_for(plan, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr("mtp.modeling.token_sampling.linear_sample", None)
    run(model, RAGGED, PhasePlan([4], [None], min_probability=[0.5]), impl="torch")
    for sampler in (Sampler(top_k=3), Sampler(top_p=0.9)):
        run(model, RAGGED, plan, sampler, impl="torch")
    process = LogitsProcessorList([lambda ids, scores: scores])
    run(model, RAGGED, plan, process=process, impl="torch")
