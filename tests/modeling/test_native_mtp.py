"""The MTP layer of main's own family as a head: decoding, replay, losses, settings."""

import pytest
import torch
from families import VOCABULARY, WINDOW, tiny_family
from family_contract import (
    FAST,
    check_fast,
    check_losses,
    check_replay,
    check_slow,
    decoded,
    rollout_batch,
    stock_of,
)
from transformers import CONFIG_MAPPING

from mtp.modeling import native_mtp
from mtp.modeling.contract import check_slow_mode
from mtp.modeling.heads import HeadConfig
from mtp.modeling.native_mtp import with_mtp_layer
from mtp.modeling.sampler import Sampler
from mtp.modeling.versions import MtpLayer
from mtp.training.objectives.scored import replay_batch

pytestmark = pytest.mark.skipif(
    MtpLayer is None, reason="transformers before 5.14 has no MTP layers"
)

FAMILIES = ("deepseek_v3", "glm4_moe", "mellum")
"""A latent cache, plain keys and values, a window of 8 tokens."""


def native_model(family, **head):
    return tiny_family(family, **{"type": "native_mtp", "hidden_size": 32, **head})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_keeps_the_contract_with_its_own_layer(family):
    model = native_model(family)
    stock = stock_of(model)
    check_slow_mode(model)
    with torch.no_grad():
        check_slow(model, stock, 20)
        check_fast(model, 20)
        rollouts = check_replay(model, stock, 20)
    check_losses(model, stock, rollouts)


@torch.no_grad()
def test_replay_agrees_with_eager_attention_too():
    model = native_model("mellum")
    model.set_attn_implementation("eager")
    config = model.mtp_head.layer.config
    config._attn_implementation = "eager"
    out = decoded(model, FAST, Sampler(), 20)
    scored = replay_batch(model, rollout_batch(out), channel_gradient=1.0, use_head=True)
    difference = scored.head.stats().logprob - rollout_batch(out).head.sampled
    assert float(difference.abs().max()) < 1e-4


@torch.no_grad()
def test_a_slot_reads_as_far_back_as_the_window():
    """Mellum's layer has a window: the rows change with the pairs in it, and with no other."""
    model = native_model("mellum")
    assert model.mtp_head.window == WINDOW
    length, anchor = 20, torch.tensor([17])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (1, length), generator=generator)
    block = torch.randint(3, VOCABULARY, (1, 3), generator=generator)
    taps = torch.randn(1, length, 1, 32, generator=generator)

    def rows(of):
        context = model.head_context(of, tokens, anchor)
        return model.mtp_head(context, model.head_embed(block))[0]

    before = rows(taps)
    # Slot j has position 17 + j, so it reads the pairs of tokens 17 + j - 7 and later, and the pair
    # of token p holds the features of p - 1.
    for position in range(17):
        other = taps.clone()
        other[0, position] += 1.0
        changed = (rows(other) - before).abs().amax(-1) > 1e-6
        expected = [17 + j - (WINDOW - 1) <= position + 1 for j in (1, 2, 3)]
        # A later slot also reads what an earlier one made of its pairs.
        for slot in (1, 2):
            expected[slot] |= expected[slot - 1]
        assert changed.tolist() == expected


def test_the_head_has_the_same_gradient_where_main_recomputes_its_layers():
    gradients = []
    for recomputes in (False, True):
        model = native_model("glm4_moe")
        with torch.no_grad():
            batch = rollout_batch(decoded(model, FAST, Sampler(), 12))
        model.train()
        if recomputes:
            model.activation_checkpointing_enable({"use_reentrant": False})
        scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
        scored.head.cross_entropy().loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {}, "a family with num_mtp_layers in its config, .* got llama"),
        ("qwen3_next", {}, "got qwen3_next, whose MTP layers transformers does not decode"),
        ("mellum", {"hidden_size": 16}, "head.hidden_size must be main's width 32"),
        ("mellum", {"taps": [1]}, r"head.taps must be \[3\], main's last"),
        ("mellum", {"num_layers": 2}, "head.num_layers must be 1"),
        ("mellum", {"shared_embeddings": False}, "head.shared_embeddings must be true"),
        ("mellum", {"recall": True}, "head.recall must be false"),
    ],
)
def test_what_the_layer_cannot_be_is_refused(family, settings, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(**{"type": "native_mtp", "hidden_size": 32, **settings}).validate()
        native_model(family, **settings)


@pytest.mark.parametrize("family", ["bailing_hybrid", "inkling_text"])
def test_layers_that_keep_more_than_keys_and_values_are_refused(family):
    with pytest.raises(ValueError, match=f"keys and values by position, got {family}"):
        with_mtp_layer(CONFIG_MAPPING[family]())


def test_a_transformers_without_mtp_layers_is_refused(monkeypatch):
    monkeypatch.setattr(native_mtp, "MtpLayer", None)
    with pytest.raises(ValueError, match="transformers 5.14 or newer, .*use head.type=eagle3"):
        native_model("mellum")
