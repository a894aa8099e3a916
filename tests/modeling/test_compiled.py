"""Compiled passes: the text of uncompiled ones, few graphs, present weights, clear refusals."""

import pytest
import torch
from families import tiny_family
from helpers import (
    CLOSE,
    EOS,
    GREEDY,
    PAD,
    PLAN,
    completions,
    run,
    tiny_model,
)
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, GenerationConfig

from mtp.modeling import compiled, versions
from mtp.modeling.compiled import CompiledMain, Compiler, check_traceable, rounded
from mtp.modeling.sampler import Sampler

pytestmark = pytest.mark.skipif(
    not versions.ASKS_FOR_QUERIES, reason="transformers before 5.14 cannot compile passes once"
)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4]]
PLANS = {"fast": PLAN, "slow": PLAN.as_slow(), "verified": PLAN.as_verified(4)}


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def both(model, compiler, prompts=PROMPTS, mode="fast", **options):
    """Decodes without and with compiled passes; they must agree. Returns the former."""
    options = {"max_new_tokens": 24, **options}
    expected = run(model, prompts, PLANS[mode], **options)
    out = run(model, prompts, PLANS[mode], compiler=compiler, **options)
    assert completions(out) == completions(expected)
    assert torch.allclose(out.logprobs, expected.logprobs, atol=1e-4)
    assert torch.equal(out.passes, expected.passes)
    return expected


# In fast mode a pass in which every row keeps one token is narrower than a block.
@pytest.mark.parametrize(("mode", "num_graphs"), [("fast", 2), ("slow", 1), ("verified", 1)])
def test_text_is_that_of_uncompiled_passes_and_graphs_are_made_once(counter, mode, num_graphs):
    model, compiler = tiny_model(), Compiler(backend=counter)
    out = both(model, compiler, mode=mode)
    assert int(out.passes.max()) > 15
    assert counter.frame_count == num_graphs
    # Other prompts of other lengths, and a batch of three: the same shapes.
    both(model, compiler, [p[:2] for p in PROMPTS], mode, max_new_tokens=30)
    both(model, compiler, PROMPTS[::-1], mode)
    assert counter.frame_count == num_graphs


def test_rows_that_end_change_no_shape(counter):
    model = tiny_model(type="parallel")
    out = both(model, Compiler(backend=counter), max_new_tokens=40)
    assert sorted(out.passes.tolist()) == [1, 4, 9, 9]  # one row is dropped after another
    assert counter.frame_count == 1


@pytest.mark.parametrize("head", ["eavesdrop that recalls", "eagle3 that drafts"])
def test_a_head_that_remembers_reads_the_same(counter, head):
    for mode in ("fast", "verified"):
        both(tiny_model(type=head), Compiler(backend=counter), mode=mode)


@pytest.mark.parametrize("mode", PLANS)
def test_samples_of_a_seed_are_the_same(counter, mode):
    given = {"sampler": Sampler(), "generator": None, "num_return_sequences": 3}
    seeds = torch.arange(12)
    model, compiler = tiny_model(), Compiler(backend=counter)
    both(model, compiler, mode=mode, seeds=seeds, **given)
    both(model, compiler, mode=mode, seeds=seeds, impl="torch", **given)


def test_weights_are_read_as_they_are_now(counter):
    model, compiler = tiny_model(), Compiler(backend=counter)
    before = both(model, compiler, mode="slow")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    after = both(model, compiler, mode="slow")
    model.load_state_dict(tiny_model(seed=1).state_dict())
    assert completions(both(model, compiler, mode="slow")) != completions(after)
    assert completions(after) != completions(before)
    assert counter.frame_count == 1


def test_a_hook_that_is_added_later_is_called(counter):
    model, compiler = tiny_model(), Compiler(backend=counter)
    before = both(model, compiler)
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: 2 * out)
    assert completions(both(model, compiler)) != completions(before)


def test_a_kept_cache_is_used_again_and_holds_nothing_of_the_last_call(counter):
    model, compiler = tiny_model(), Compiler(backend=counter)
    main = CompiledMain.of(model, compiler)
    both(model, compiler)
    (cache,) = main.kept.values()
    for states in cache.states:
        states.fill_(torch.nan)
    both(model, compiler)
    assert list(main.kept.values()) == [cache]
    for rows in (1, 2, 3):
        both(model, compiler, PROMPTS[:rows], mode="slow", max_new_tokens=3)
    assert len(main.kept) == 2


def test_a_call_within_a_call_has_a_cache_of_its_own(counter):
    model, compiler = tiny_model(), Compiler(backend=counter)
    expected = run(model, PROMPTS, PLAN)

    def another(block):
        run(model, PROMPTS[::-1], PLAN, max_new_tokens=6, compiler=compiler)

    out = run(model, PROMPTS, PLAN, compiler=compiler, on_block=another)
    assert completions(out) == completions(expected)


def test_numbers_are_rounded_up_to_few_sizes():
    assert [rounded(n) for n in range(1, 10)] == [1, 2, 3, 4, 6, 6, 8, 8, 12]
    assert [rounded(n, 64) for n in (5, 64, 65, 96, 97, 300)] == [64, 64, 96, 96, 128, 384]


def test_too_many_shapes_are_an_error(counter, monkeypatch):
    monkeypatch.setattr(compiled, "MOST_SHAPES", 2)
    model, compiler = tiny_model(), Compiler(backend=counter)
    both(model, compiler)
    with pytest.raises(ValueError, match="at most 2 shapes .* 8 rows .* batches of fewer sizes"):
        run(model, PROMPTS * 2, PLAN, compiler=compiler)


def made():
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    model.generation_config.mtp_phases = [
        {"name": "thought", "mode": "fast", "opened_by": None},
        {"name": "answer", "mode": "slow", "opened_by": CLOSE},
    ]
    return model


def test_generate_compiles_as_its_compile_config_says(counter):
    model, ids = made(), torch.tensor([[8], [9]])
    given = {"mtp_mode": "fast", "max_new_tokens": 24}
    expected = model.generate(ids, **given)
    config = CompileConfig(backend=counter)
    assert torch.equal(model.generate(ids, **given, compile_config=config), expected)
    assert counter.frame_count == 2  # blocks of the thought, single tokens of the answer
    given["cache_implementation"] = "static"
    assert torch.equal(model.generate(ids, **given, compile_config=config), expected)
    torch._dynamo.reset()
    model.generate(ids, **given, compile_config=config, disable_compile=True)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache_implementation": "dynamic"}, "cache_implementation must be static with compile_c"),
        (
            {"compile_config": CompileConfig(dynamic=True)},
            "compile_config.dynamic must be left out",
        ),
        (
            {"compile_config": CompileConfig(options={"a": 1})},
            "compile_config.options must be left",
        ),
    ],
)
def test_generate_refuses_what_would_not_be_compiled_once(given, message):
    given = {"compile_config": CompileConfig(backend="eager"), **given}
    with pytest.raises(ValueError, match=message):
        made().generate(torch.tensor([[5, 6]]), mtp_mode="fast", **given)


def test_search_refuses_compiled_passes():
    with pytest.raises(ValueError, match="search does not support compile_config"):
        made().search(
            torch.tensor([[5, 6]]),
            config={"method": "beam", "n": 2},
            do_sample=True,
            compile_config=CompileConfig(backend="eager"),
        )


def test_a_main_that_cannot_be_compiled_is_refused_before_any_pass(monkeypatch):
    with pytest.raises(ValueError, match="Qwen3NextMTP.*: it has no cache of keys and values"):
        run(tiny_family("qwen3_next"), PROMPTS, PLAN, compiler=Compiler(backend="eager"))
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.base_layer = torch.nn.Identity()
    with pytest.raises(ValueError, match="it has adapters; merge them by merge_and_unload"):
        run(model, PROMPTS, PLAN, compiler=Compiler(backend="eager"))
    monkeypatch.setattr(compiled, "ASKS_FOR_QUERIES", False)
    with pytest.raises(ValueError, match="before 5.14 .* install a newer transformers"):
        run(tiny_model(), PROMPTS, PLAN, compiler=Compiler(backend="eager"))


def test_the_check_at_build_finds_a_graph_that_torch_cannot_make(counter):
    check_traceable(tiny_model())
    model = tiny_model()
    model.model.layers[1].mlp.register_forward_hook(lambda *given: torch._dynamo.graph_break())
    with pytest.raises(ValueError, match="must be left out for LlamaMTP.* torch.compile stops"):
        check_traceable(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # in inductor
@pytest.mark.parametrize("mode", PLANS)
def test_the_real_compiler_writes_the_same(mode):
    torch._dynamo.reset()
    both(tiny_model(), Compiler(), mode=mode)
    seeds = torch.arange(4)
    both(tiny_model(), Compiler(), mode=mode, sampler=Sampler(), generator=None, seeds=seeds)
    both(tiny_model("qwen3", type="parallel"), Compiler(), mode=mode, sampler=GREEDY)
