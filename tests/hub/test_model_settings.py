"""Settings of the model and its head: impossible ones are one line; a new head's first state."""

import json
from dataclasses import asdict

import pytest
import torch
from helpers import checks_configs, tiny_model
from toy import HEAD, PHASES, SIZES, build_toy, save_toy
from transformers import GemmaConfig, GemmaForCausalLM, OlmoConfig, OlmoForCausalLM

from mtp.common.errors import one_line
from mtp.hub.build import ModelConfig, build_model, load_model, save_model, start_from_main
from mtp.modeling.heads import HeadConfig
from mtp.modeling.modeling_mtp import MTPMixin
from mtp.rollouts.rollout import DecodingConfig
from mtp.tasks.running_sum import RunningSumConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intermediate_size": 0}, "head.intermediate_size must be at least 1, got 0"),
        ({"intermediate_size": -3}, "head.intermediate_size .* got -3"),
        ({"num_slots": 0}, "head.num_slots .* got 0"),
        ({"num_layers": -1}, "head.num_layers .* got -1"),
        ({"num_attention_heads": 0}, "head.num_attention_heads .* got 0"),
        ({"hidden_size": 16.0}, "head.hidden_size must be a whole number, got 16.0"),
        ({"num_slots": True}, "head.num_slots must be a whole number, got True"),
        ({"hidden_size": "wide"}, "head.hidden_size .* got 'wide'"),
        ({"hidden_size": 18}, "head.hidden_size must be a multiple of .*=4, got 18"),
        ({"recall": 1}, "head.recall must be true or false, got 1"),
        ({"shared_embeddings": "no"}, "head.shared_embeddings must be true or false, got 'no'"),
        ({"taps": [2, 1, 2]}, r"head.taps must name each layer once, got \[2, 1, 2\]"),
        ({"taps": 2}, "head.taps must be null or a list of layers, got 2"),
        ({"taps": [0.5]}, r"head.taps must be null or a list of layers, got \[0.5\]"),
        ({"taps": []}, r"head.taps must be layers between 0 and 3 .* got \[\]"),
        ({"taps": [-1]}, r"head.taps must be layers between 0 and 3 .* got \[-1\]"),
        ({"taps": [4]}, r"head.taps must be layers between 0 and 3 .* got \[4\]"),
        (
            {"type": "shout"},
            r"head.type must be one of \['eagle3', .*'parallel'\], got 'shout'",
        ),
    ],
)
def test_heads_that_cannot_be_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**settings)


def scratch(head: HeadConfig | None = None, **model: object):
    return build_model(
        ModelConfig(**{"config": dict(SIZES), **model}),
        head or HeadConfig(**HEAD),
        DecodingConfig(phases=PHASES),
        RunningSumConfig().build(),
    )[0]


MISFITS = [
    ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
    ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of .*=3, got 4"),
    ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
    ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1, got -1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    ({"intermediate_size": 0}, "intermediate_size must be at least 1, got 0"),
    ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
    ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1, got 0"),
    pytest.param({"head_dim": 7}, "even rotary dimension", marks=checks_configs),
    ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
    ({"hidden_size": 32.0}, "'hidden_size' expected int, got float"),
    ({"hidden_act": "foo"}, "KeyError: 'foo'"),
    ({"tie_word_embeddings": "x"}, "'tie_word_embeddings' expected bool"),
    ({"vocab_size": 0}, "vocab_size must not be set there, got 0; the task's tokenizer sets it"),
    ({"eos_token_id": 5}, "eos_token_id must not be set there"),
    ({"attn_implementation": "eager"}, "attn_implementation must not .*; model.attention sets it"),
    ({"dtype": "float16"}, "dtype must not be set there, got 'float16'; model.dtype sets it"),
    ({"mtp": {}}, "mtp must not be set there"),
    ({"num_hidden_layer": 2}, "num_hidden_layer is none of its fields; did you mean num_hidden_l"),
    ({"colour": 2}, "colour is none of its fields; leave it out"),
]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("fields", "message"), MISFITS)
def test_a_main_that_cannot_be_is_one_line(family, fields, message):
    with pytest.raises(ValueError, match=f"model.config does not fit {family}: .*{message}") as e:
        scratch(family=family, config=SIZES | {"head_dim": 8} | fields)
    assert "\n" not in str(one_line(e.value))


@checks_configs
def test_widths_that_do_not_divide_are_one_line():
    with pytest.raises(ValueError, match="model.config does not fit llama: .*33"):
        scratch(config=SIZES | {"hidden_size": 33})


def test_windows_and_other_families_are_built_from_scratch():
    slides = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    model = scratch(family="qwen3", config=SIZES | {"head_dim": 8} | slides)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = scratch(family="gpt2", config=sizes)
    assert type(model).__name__ == "GPT2MTPLMHeadModel"
    assert model.config.resid_pdrop == model.config.attn_pdrop == 0.0
    with pytest.raises(ValueError, match="resid_pdrop must be 0 in main's config, got 0.5"):
        scratch(family="gpt2", config=sizes | {"resid_pdrop": 0.5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "model.dtype must be float32 or bfloat16, got 'float16'"),
        ({"attention": "flex_attention"}, "model.attention must be sdpa or eager, got 'flex_atten"),
        ({"attention": "flash_attention_2"}, "model.attention must be sdpa or eager"),
        ({"family": "vit"}, "model.family names no family: .* has a causal LM of, got 'vit'"),
    ],
)
def test_impossible_settings_of_the_model_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        scratch(**settings)


def saved_checkpoint(folder, **settings):
    model, text = build_toy(save_toy(folder / "base"), head=settings)
    save_model(model, text, folder / "saved")
    return model, folder / "saved"


def forget(folder, *names):
    """Take fields out of the saved head's settings."""
    content = json.loads((folder / "config.json").read_text())
    for name in names:
        del content["mtp"][name]
    (folder / "config.json").write_text(json.dumps(content))


def test_a_checkpoint_from_before_a_field_was_added_opens_with_its_default(tmp_path):
    model, folder = saved_checkpoint(tmp_path)
    forget(folder, "recall", "shared_embeddings")
    for opened in (build_toy(folder)[0], load_model(folder)[0]):
        assert opened.mtp_settings == model.mtp_settings
        assert opened.config.mtp == model.mtp_settings.to_checkpoint()
        weights = dict(opened.named_parameters())
        assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_taps_by_default_and_by_name_are_the_same_head(tmp_path):
    model, folder = saved_checkpoint(tmp_path)
    assert model.mtp_settings.taps is None
    assert build_toy(folder, head={"taps": model.mtp_taps})[0].mtp_taps == [1, 2]


def test_another_head_than_the_checkpoints_is_refused_with_the_difference(tmp_path):
    _, folder = saved_checkpoint(tmp_path)
    message = r"set head.num_slots=3 head.taps=\[1,2\], got num_slots=2 taps=\[2\]"
    with pytest.raises(ValueError, match=message):
        build_toy(folder, head={"num_slots": 2, "taps": [2]})


@pytest.mark.parametrize(
    ("mtp", "message"),
    [
        ({"num_slots": 3, "colour": 1, "smell": 2}, r"does not know \(colour, smell\); open the"),
        ("eavesdrop", "must be a mapping of a head's settings, got 'eavesdrop'"),
        ({"num_slots": 0}, "head.num_slots must be .* got 0"),
    ],
)
def test_settings_of_a_saved_head_that_mean_nothing_are_refused(tmp_path, mtp, message):
    model, folder = saved_checkpoint(tmp_path)
    content = json.loads((folder / "config.json").read_text()) | {"mtp": mtp}
    (folder / "config.json").write_text(json.dumps(content))
    for opens in (build_toy, load_model, type(model).from_pretrained):
        with pytest.raises(ValueError, match=message):
            opens(folder)


class GemmaMTP(MTPMixin, GemmaForCausalLM):
    """Its final norm multiplies by 1 + w."""


class OlmoMTP(MTPMixin, OlmoForCausalLM):
    """Its final norm has no weight."""


def parallel_of(cls, config_class):
    torch.manual_seed(3)
    config = config_class(**SIZES, head_dim=8, vocab_size=23, pad_token_id=0, bos_token_id=None)
    head = HeadConfig(**HEAD | {"type": "parallel", "hidden_size": 32})
    config.mtp = asdict(head)
    return cls(config).eval()


@pytest.mark.parametrize("scale", [None, 0.0, 2.0])
@torch.no_grad()
def test_a_new_parallel_head_begins_as_main_whatever_its_norm_does(scale):
    model = parallel_of(*((OlmoMTP, OlmoConfig) if scale is None else (GemmaMTP, GemmaConfig)))
    expected = 1.0
    if scale is not None:
        weight = model.model.norm.weight
        weight.copy_(scale * torch.linspace(-1, 1, 32))
        expected = float((1 + weight).square().mean().sqrt())
    start_from_main(model)
    out = model.mtp_head.out_proj.weight
    assert torch.allclose(out, expected * torch.eye(32), rtol=1e-4)
    tokens = torch.tensor([[5, 6, 7, 8]])
    rows = model.replay(tokens, torch.arange(4), torch.zeros(4, 3, dtype=torch.int64))
    main, head = rows.main_hidden[0], rows.head_hidden
    assert head is not None
    cosine = torch.nn.functional.cosine_similarity(head, main[:, None], dim=-1)
    assert torch.allclose(cosine, torch.ones(4, 3), atol=1e-4)
    assert torch.allclose(head.square().mean(-1).sqrt(), torch.full((4, 3), expected), rtol=1e-3)


@torch.no_grad()
def test_the_size_of_mains_rows_is_that_of_an_rms_norms_weight():
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(type="parallel", hidden_size=32).to(dtype)
        weight = model.model.norm.weight
        weight.copy_(torch.linspace(0.5, 3, 32))
        start_from_main(model)
        size = model.mtp_head.out_proj.weight[0, 0].float()
        expected = weight.float().square().mean().sqrt()
        assert torch.allclose(size, expected, rtol=1e-6 if dtype == torch.float32 else 4e-3)


def test_a_run_from_scratch_is_compared_with_the_stock_forward(monkeypatch):
    seen = []
    monkeypatch.setattr("mtp.hub.build.check_slow_mode", lambda *given: seen.append(given))
    model = scratch()
    assert seen == [(model, "model.config of family llama")]
