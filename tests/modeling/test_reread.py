"""A main without a cache by position reads its whole text in each pass, and writes the same."""

import pytest
import torch
from helpers import CLOSE, HEADS, completions, run, tiny_model

from mtp.modeling.cache import TextCache
from mtp.modeling.phases import PhasePlan
from mtp.modeling.sampler import Sampler

RAGGED = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [4, 4]]


def pair(head):
    """One model twice: with a cache, and reading its whole text."""
    cached, whole = tiny_model(type=head), tiny_model(type=head)
    whole.mtp_rereads = "the test says so"
    assert isinstance(whole.new_cache(1, 8), TextCache)
    return cached, whole


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("verified", [False, True])
def test_the_slower_loop_writes_the_same_tokens(head, verified):
    plan = PhasePlan(keep=[4, 1], opened_by=[None, CLOSE], eos_ids=[1], verified=[verified, False])
    texts, logprobs = [], []
    for model in pair(head):
        out = run(model, RAGGED, plan, Sampler(), num_return_sequences=2)
        texts.append(completions(out))
        logprobs.append(out.logprobs)
    assert texts[0] == texts[1]
    torch.testing.assert_close(*logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["best_of_n", "beam", "mcts"])
def test_the_slower_loop_searches_the_same_texts(method):
    found = []
    for model in pair("eavesdrop that recalls"):
        model.generation_config.mtp_phases = [
            {"name": "thought", "mode": "fast", "opened_by": None},
            {"name": "answer", "mode": "slow", "opened_by": CLOSE},
        ]
        out = model.search(
            torch.tensor([[2, 5, 6, 7, 8], [2, 9, 4, 5, 5]]), config={"method": method, "n": 3},
            do_sample=True, top_k=0, max_new_tokens=12,
            generator=torch.Generator().manual_seed(4),
        )  # fmt: skip
        found.append(out.sequences.tolist())
    assert found[0] == found[1]


def test_token_ids_are_exact_under_autocast_and_beside_narrow_states():
    ids = torch.tensor([[100_003, 7, 131_071], [65_537, 3, 9]])
    cache = TextCache(2, 8, num_head_layers=1)
    positions = torch.arange(3).expand(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache.place(positions, 3, is_even=True)
        assert torch.equal(cache.texts(ids), ids)
        keys = torch.randn(2, 2, 3, 4)
        cache.remember(0, keys, keys)
    parts = cache.part(torch.tensor([1, 0]), torch.tensor([0, 0]), 3)
    other = TextCache(2, 8, num_head_layers=1)
    other.load(parts, cache.shapes)
    assert torch.equal(other.states[0][:, 0, :, 0], ids[[1, 0]])
    assert other.states[2].dtype == torch.bfloat16
    assert torch.equal(other.states[2], cache.states[2][[1, 0]][:, :, :3])
