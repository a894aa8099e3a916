"""Attention of passes beside transformers' own: no setting changes, and threads share a model."""

import threading

import pytest
import torch
from helpers import CLOSE, PAD, VOCABULARY, run, tiny_model
from transformers import LlamaForCausalLM

from mtp.modeling.attention import EAGER, NAME
from mtp.modeling.phases import PhasePlan
from mtp.modeling.sampler import Sampler

PHASES = [
    {"name": "thought", "mode": "fast", "opened_by": None},
    {"name": "answer", "mode": "slow", "opened_by": CLOSE},
]


def test_nine_threads_share_a_model_and_leave_no_trace(monkeypatch):
    model = tiny_model()
    model.generation_config.mtp_phases = PHASES
    ids = torch.tensor([[PAD, PAD, 5, 6], [8, 4, 9, 10], [PAD, 7, 7, 3]])
    given = {"attention_mask": ids != PAD, "max_new_tokens": 40}
    modes = ["fast", "slow", "verified", "stock"]
    expected = {mode: model.generate(ids, mtp_mode=mode, **given) for mode in modes}
    seen, texts, forward = set(), [], type(model.model).forward

    def noting(self, *args, **kwargs):
        seen.add(self.config._attn_implementation)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", noting)

    def call(mode):
        texts.append((mode, model.generate(ids, mtp_mode=mode, **given)))

    threads = [threading.Thread(target=call, args=(modes[i % 4],)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 9
    assert all(torch.equal(text, expected[mode]) for mode, text in texts)
    assert seen == {NAME} == {model.config._attn_implementation}


def test_outside_passes_a_model_attends_as_transformers_to_the_last_bit():
    model = tiny_model()
    stock = LlamaForCausalLM(model.config.__class__(**model.config.to_dict())).eval()
    stock.load_state_dict(model.state_dict(), strict=False)
    assert stock.config._attn_implementation == "sdpa"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    with torch.no_grad():
        parts = []
        for main in (model, stock):
            first = main(ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
            cache = first.past_key_values
            second = main(ids[:, 7:], attention_mask=mask, past_key_values=cache)
            parts.append(torch.cat([first.logits, second.logits], 1))
    assert torch.equal(*parts)
    given = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(ids, **given), stock.generate(ids, **given))
    given = {"max_new_tokens": 20, "prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(ids[2:], **given), stock.generate(ids[2:], **given))


def test_the_implementation_is_chosen_as_in_transformers():
    model = tiny_model()
    assert model.config._attn_implementation == NAME
    for asked, found in (("eager", EAGER), ("sdpa", NAME), ("flex_attention", "flex_attention")):
        model.set_attn_implementation(asked)
        assert model.config._attn_implementation == found
    assert "of_blocks" not in tiny_model().config.to_json_string()
    for asked, found in (("eager", EAGER), ("sdpa", NAME), (None, NAME)):
        config = tiny_model().config
        config._attn_implementation = asked
        assert type(model)(config).config._attn_implementation == found


@pytest.mark.parametrize("mode", ["fast", "slow", "verified"])
def test_another_implementation_is_refused_before_any_pass(mode, monkeypatch):
    model = tiny_model()
    model.generation_config.mtp_phases = PHASES
    model.set_attn_implementation("flex_attention")
    monkeypatch.setattr(type(model), "main_states", None)
    ids = torch.tensor([[5, 6, 7]])
    message = "attn_implementation must be sdpa or eager to decode with mtp, got 'flex_attention'"
    with pytest.raises(ValueError, match=message):
        model.generate(ids, mtp_mode=mode)
    with pytest.raises(ValueError, match=message):
        model.search(ids, config={"n": 2}, mtp_mode=mode, do_sample=True)
    with pytest.raises(ValueError, match=message):
        run(model, [[5, 6]], PhasePlan([4], [None]), Sampler())
