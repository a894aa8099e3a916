"""The differences between versions of transformers: both ways give the same numbers."""

import pytest
import torch
from families import PAD, tiny_family

from mtp.modeling import contract, versions
from mtp.modeling.decode import decode
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.phases import PhasePlan
from mtp.modeling.records import pad
from mtp.modeling.sampler import Sampler


def test_all_hidden_states_are_asked_for_where_a_list_may_give_others(monkeypatch):
    monkeypatch.setattr(versions, "SELECTS_HIDDEN_STATES", False)
    assert versions.wanted_states([1, 3]) is True and versions.wanted_states([]) is None
    monkeypatch.setattr(versions, "SELECTS_HIDDEN_STATES", True)
    assert versions.wanted_states([1, 3]) == [1, 3] and versions.wanted_states([]) is None


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_positions_reach_the_mask_where_the_cache_is_not_asked_for_them(monkeypatch, family):
    """gemma2 has windows of 8 tokens; rows grow at different rates."""
    model = tiny_family(family)
    tokens, lengths = pad([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [15, 16], [17]], PAD)
    options = DecodeOptions(sampler=Sampler(temperature=0), max_new_tokens=30, pad_id=PAD)

    def written():
        out = decode(model, tokens, lengths, PhasePlan([3], [None], verified=[True]), options)
        return out.tokens

    usual = written()
    monkeypatch.setattr(versions, "ASKS_FOR_QUERIES", False)
    assert torch.equal(written(), usual)


def test_taps_of_other_layers_are_refused(monkeypatch):
    model = tiny_family("llama")
    contract.check_slow_mode(model)
    main_states = model.main_states

    def shifted(*args, **kwargs):
        hidden, taps = main_states(*args, **kwargs)
        return hidden, [taps[-1], *taps[:-1]]

    monkeypatch.setattr(model, "main_states", shifted)
    with pytest.raises(ValueError, match=r"must give the head hidden_states\[\d\] .* newer transf"):
        contract.check_slow_mode(model)


def test_activation_checkpointing_is_set_by_whatever_name_the_model_knows():
    model = tiny_family("llama")
    layer = model.model.layers[0]
    versions.set_activation_checkpointing(model, True)
    assert layer.gradient_checkpointing
    versions.set_activation_checkpointing(model, False)
    assert not layer.gradient_checkpointing
