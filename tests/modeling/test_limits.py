"""Rows of one batch that may write different numbers of tokens."""

import pytest
import torch
from helpers import completions, run, tiny_model

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


def test_limits_must_be_one_for_each_row(plan):
    with pytest.raises(ValueError, match=r"one for each of 14 rows, got \[2\]"):
        run(tiny_model(), PROMPTS, plan, limits=torch.tensor([1, 2]))
