"""Costs of a pass besides its arithmetic: reads from the device, casts, copies."""

import pytest
import torch
from helpers import HEADS, PAD, PLAN, Waits, completions, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mtp.modeling.attention import attend
from mtp.modeling.decode import PassLoop, decode
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.phases import PhasePlan
from mtp.modeling.records import pad
from mtp.modeling.sampler import Sampler
from mtp.modeling.versions import wanted_states
from mtp.rollouts.rollout import keep_casts


def num_waits(num_rows, mode, max_new_tokens, options, waits_for_rows):
    """Waits of a whole run, and its passes."""
    model = tiny_model()
    tokens, lengths = pad([[5, 6, 7 + row] for row in range(num_rows)], PAD)
    plan = PhasePlan([1 if mode == "slow" else 4], [None], verified=[mode == "verified"])
    with Waits() as waits, torch.no_grad():
        options = DecodeOptions(max_new_tokens=max_new_tokens, pad_id=PAD, **options)
        loop = PassLoop(model, tokens, lengths, [plan] * num_rows, options)
        loop.waits_for_rows = waits_for_rows
        continues = True
        while continues:
            _, continues = loop.run_pass()
    return waits.count, int(loop.running.decoded().passes.max())


SAMPLING = {
    "greedy": lambda rows: {"sampler": Sampler(temperature=0)},
    "top_k": lambda rows: {"sampler": Sampler(top_k=5), "seeds": torch.arange(rows)},
    "seeds": lambda rows: {"sampler": Sampler(), "seeds": torch.arange(rows)},
}


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("mode", ["fast", "slow", "verified"])
def test_a_pass_is_awaited_once_whatever_the_batch(mode, sampling):
    """On an accelerator; on a CPU the rows that use the head are read too."""
    for waits_for_rows, per_pass in ((False, 1), (True, 1 if mode == "slow" else 2)):
        for num_rows in (1, 4):
            options = SAMPLING[sampling](num_rows)
            short = num_waits(num_rows, mode, 8, options, waits_for_rows)
            long = num_waits(num_rows, mode, 24, options, waits_for_rows)
            # Rows that end early are dropped at most log2(batch) times, at one more wait each.
            slack = 2 if num_rows > 1 else 0
            assert long[0] - short[0] <= per_pass * (long[1] - short[1]) + slack
            assert long[1] > short[1]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", ["fast", "verified"])
def test_the_head_may_write_for_rows_that_do_not_use_it(mode, head):
    """The text is the same whether the host knows which rows use the head or not."""
    model = tiny_model(type=head)
    plan = PLAN if mode == "fast" else PLAN.as_verified(4)
    tokens, lengths = pad([[5, 9, 14], [7], [3, 8, 5, 11, 6], [5, 9]], PAD)
    for sampler in (Sampler(temperature=0), Sampler()):
        out = []
        for waits_for_rows in (True, False):
            options = DecodeOptions(
                sampler=sampler, max_new_tokens=24, pad_id=PAD, seeds=torch.arange(4)
            )
            with torch.no_grad():
                loop = PassLoop(model, tokens, lengths, [plan] * 4, options)
                loop.waits_for_rows, continues = waits_for_rows, True
                while continues:
                    _, continues = loop.run_pass()
            out.append(loop.running.decoded())
        first, second = map(vars, out)
        assert completions(out[0]) == completions(out[1])
        for name in ("slots", "lengths", "passes", "finished", "accepted"):
            assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first["logprobs"], second["logprobs"])


class Casts(TorchDispatchMode):
    """Shapes of the matrices that are cast to another dtype."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].ndim == 2:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", [None, "torch"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", ["fast", "verified"])
def test_autocast_casts_a_weight_once_and_not_at_every_pass(mode, head, kernels):
    model = tiny_model(type=head)
    model.model.requires_grad_(False)  # autocast itself keeps casts of trained weights only
    shapes = {tuple(weight.shape) for weight in model.parameters() if weight.ndim == 2}
    tokens, lengths = pad([[5, 6, 7], [8, 9]], PAD)
    plan = PhasePlan([4], [None], verified=[mode == "verified"])
    counts = []
    for max_new_tokens in (8, 24):
        with torch.autocast("cpu", torch.bfloat16), keep_casts(model), Casts() as casts:
            decode(
                model,
                tokens,
                lengths,
                plan,
                DecodeOptions(
                    sampler=Sampler(), max_new_tokens=max_new_tokens, pad_id=PAD, impl=kernels
                ),
            )
        counts.append(sum(shape in shapes for shape in casts.shapes))
    assert 0 < counts[1] == counts[0]
    assert not any(weight.requires_grad for weight in model.model.parameters())
    assert all(weight.requires_grad for weight in model.mtp_head.parameters())


@pytest.mark.parametrize("mode", ["fast", "verified"])
def test_the_cache_holds_what_autocast_reads(mode):
    model = tiny_model()
    tokens, lengths = pad([[5, 6, 7], [8, 9]], PAD)
    plan = PhasePlan([4], [None], verified=[mode == "verified"])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        loop = PassLoop(
            model,
            tokens,
            lengths,
            [plan, plan],
            DecodeOptions(sampler=Sampler(temperature=0), max_new_tokens=16, pad_id=PAD),
        )
        for _ in range(3):
            loop.run_pass()
    assert {states.dtype for states in loop.cache.states} == {torch.bfloat16}


def test_the_cache_grows_to_what_a_text_may_take_and_no_further():
    model, capacities, goes_on = tiny_model(), [], True
    tokens, lengths = pad([[5, 6, 7, 8, 9]], PAD)
    plan = PhasePlan([model.block_size], [None])
    with torch.no_grad():
        loop = PassLoop(
            model,
            tokens,
            lengths,
            [plan],
            DecodeOptions(sampler=Sampler(temperature=0), max_new_tokens=40, pad_id=PAD),
        )
        while goes_on:
            _, goes_on = loop.run_pass()
            capacities.append(loop.cache.capacity)
    assert loop.cache.length > 40
    assert sorted(set(capacities)) == [5, 10, 20, 40, 5 + 40 + 2 * model.block_size]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("num_queries", [1, 5])
def test_a_block_attends_as_transformers_sdpa_does(num_queries, masked):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, num_queries, 8, generator=generator)
    key, value = torch.randn(2, 3, 2, 11, 8, generator=generator)
    mask = None
    if masked:
        mask = torch.rand(3, 1, num_queries, 11, generator=generator) < 0.6
        mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, False
    ours, _ = attend(module, query, key, value, mask, scaling=0.3, in_pass=True)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert torch.allclose(ours, theirs, atol=1e-6)
    outside, _ = attend(module, query, key, value, mask, scaling=0.3)
    assert torch.equal(outside, theirs)


def test_rows_of_one_length_are_given_no_mask():
    model, given = tiny_model(), []
    model.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, kwargs, out: given.append(kwargs["attention_mask"] is None),
        with_kwargs=True,
    )
    plan = PhasePlan([1], [None])
    texts = []
    for prompts in ([[5, 6, 7], [8, 9, 4]], [[5, 6, 7], [8, 9, 4], [3]]):
        given.clear()
        tokens, lengths = pad(prompts, PAD)
        out = decode(
            model,
            tokens,
            lengths,
            plan,
            DecodeOptions(sampler=Sampler(temperature=0), max_new_tokens=6, pad_id=PAD),
        )
        assert given == [len(prompts) == 2] * 6
        texts.append(out.tokens[:2])
    assert torch.equal(*texts)


@pytest.mark.parametrize("keep", [1, 3])
def test_main_is_asked_for_taps_only_where_a_row_may_use_the_head(keep, monkeypatch):
    model = tiny_model()
    given, forward = [], type(model.model).forward

    def noting(self, *args, **kwargs):
        given.append(kwargs["output_hidden_states"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", noting)
    tokens, lengths = pad([[5, 6, 7]], PAD)
    plan = PhasePlan([keep], [None])
    decode(
        model,
        tokens,
        lengths,
        plan,
        DecodeOptions(sampler=Sampler(temperature=0), max_new_tokens=6, pad_id=PAD),
    )
    assert given == ([None] * 6 if keep == 1 else [wanted_states(model.mtp_taps)] * 2)
