"""Rows of one batch that may write different numbers of tokens."""

from dataclasses import replace

import pytest
import torch
from families import tiny_family
from helpers import CLOSE, completions, run, tiny_model

from mtp.modeling import versions
from mtp.modeling.compiled import Compiler
from mtp.modeling.sampler import Sampler

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [4, 4]] + [[i, 22 - i] for i in range(3, 13)]
LIMITS = [i % 8 for i in range(len(PROMPTS))]


@pytest.mark.parametrize("mode", ["slow", "fast", "verified"])
def test_each_row_is_cut_at_its_own_limit(mode, plan):
    """Each text is that of a batch of its own with that limit; a row of limit 0 stays empty."""
    model = tiny_model()
    chosen = {"slow": plan.as_slow(), "fast": plan, "verified": plan.as_verified(4)}[mode]
    out = run(model, PROMPTS, chosen, max_new_tokens=8, limits=torch.tensor(LIMITS))
    for row, (prompt, limit) in enumerate(zip(PROMPTS, LIMITS, strict=True)):
        alone = run(model, [prompt], chosen, max_new_tokens=limit) if limit else None
        assert completions(out)[row] == ([] if alone is None else completions(alone)[0])
        assert int(out.passes[row]) == (0 if alone is None else int(alone.passes[0]))
    assert (out.lengths == torch.tensor(LIMITS)).sum() > len(LIMITS) / 2


@pytest.mark.parametrize("mode", ["slow", "fast", "verified"])
def test_a_phase_that_opens_itself_again_has_one_budget(mode, plan):
    """Main writes the first phase's delimiter all the time; its budget closes it all the same."""
    plan = replace(plan, opened_by=[4, CLOSE], max_tokens=[6, None])
    chosen = {"slow": plan.as_slow(), "fast": plan, "verified": plan.as_verified(4)}[mode]

    def delimiters(texts, scores, padding):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([4]), 0.0)

    out = run(tiny_model(), [[5, 4], [6, 7, 4]], chosen, max_new_tokens=9, process=delimiters)
    assert [text[:7] for text in completions(out)] == [[4] * 6 + [CLOSE]] * 2


def test_limits_must_be_one_for_each_row(plan):
    with pytest.raises(ValueError, match=r"one for each of 14 rows, got \[2\]"):
        run(tiny_model(), PROMPTS, plan, limits=torch.tensor([1, 2]))


def of_positions(family, number):
    """A main with learned positions, which has this many."""
    model = tiny_family(family)
    table = model.transformer.wpe if family == "gpt2" else model.transformer.positions_embed
    table.weight = torch.nn.Parameter(table.weight[:number])
    return model


@pytest.mark.parametrize(
    ("family", "compiles"), [("gpt2", False), ("gpt2", True), ("openai-gpt", False)]
)
def test_a_text_may_end_at_the_last_position_of_main(family, compiles, plan):
    """Rows that end before their neighbours are padded beyond it."""
    if compiles and not versions.ASKS_FOR_QUERIES:
        pytest.skip("transformers before 5.14 cannot compile passes once")
    prompts = [[5, 6, 7] * 3 + [8], [9], [9, 10, 11, 12, 13, 14], [4, 4]]
    options = {"compiler": Compiler(backend="eager")} if compiles else {}
    few, many = (
        [
            run(model, prompts, plan.as_verified(4), Sampler(), seed, max_new_tokens=10, **options)
            for seed in range(8)
        ]
        for model in (of_positions(family, 20), of_positions(family, 60))
    )
    assert list(map(completions, few)) == list(map(completions, many))
    assert any(int(out.lengths[0]) == 10 for out in few)
