"""A main that the pass loop cannot follow is refused before anything trains."""

import pytest
import torch
from helpers import tiny_model
from torch import nn
from toy import SIZES, build_toy, save_toy
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
)

from mtp.modeling.contract import check_config, check_slow_mode
from mtp.modeling.modeling_mtp import LlamaMTPForCausalLM, MTPMixin, Qwen3MTPForCausalLM


class MistralMTP(MTPMixin, MistralForCausalLM):
    pass


class GemmaMTP(MTPMixin, GemmaForCausalLM):
    pass


class Gemma2MTP(MTPMixin, Gemma2ForCausalLM):
    pass


class GraniteMTP(MTPMixin, GraniteForCausalLM):
    pass


class CohereMTP(MTPMixin, CohereForCausalLM):
    pass


class PhiMTP(MTPMixin, PhiForCausalLM):
    pass


class GPT2MTP(MTPMixin, GPT2LMHeadModel):
    pass


MAIN = SIZES | {"vocab_size": 23, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (
            Qwen3MTPForCausalLM,
            Qwen3Config(**MAIN, **WINDOW),
            r"layer_types .* 0: sliding_attention, 1: sliding_attention \(sliding_window=8\)",
        ),
        (
            Qwen3MTPForCausalLM,
            Qwen3Config(**MAIN, **WINDOW | {"max_window_layers": 1}),
            r"layer_types .* got 1: sliding_attention \(sliding_window=8\).*use_sliding_window=fa",
        ),
        (
            Qwen3MTPForCausalLM,
            Qwen3Config(**MAIN, layer_types=["full_attention", "chunked_attention"]),
            "layer_types must be full_attention .* got 1: chunked_attention",
        ),
        (
            MistralMTP,
            MistralConfig(**MAIN, sliding_window=8),
            "sliding_window must be null .* got 8.*set sliding_window=null",
        ),
        (
            # Mistral reads no layer_types: its layers slide whatever they say.
            MistralMTP,
            MistralConfig(**MAIN, sliding_window=8, layer_types=["full_attention"] * 2),
            "sliding_window must be null",
        ),
        (
            Gemma2MTP,
            Gemma2Config(**MAIN, layer_types=["full_attention"] * 2),
            r"final_logit_softcapping must be null .* got 30\.0",
        ),
        (
            GraniteMTP,
            GraniteConfig(**MAIN, logits_scaling=8.0),
            r"logits_scaling must be 1\.0 .* got 8\.0",
        ),
        (CohereMTP, CohereConfig(**MAIN), r"logit_scale must be 1\.0 .* got 0\.0625"),
        (PhiMTP, PhiConfig(**MAIN), r"lm_head\.bias is there"),
        (GPT2MTP, GPT2Config(n_embd=32, n_head=4, n_layer=2), "in 'transformer'"),
        (
            LlamaMTPForCausalLM,
            LlamaConfig(**MAIN, rope_parameters=DYNAMIC),
            "rope_type must not be dynamic",
        ),
        (
            LlamaMTPForCausalLM,
            LlamaConfig(**MAIN, attention_dropout=0.1),
            r"attention_dropout must be 0 .* got 0\.1",
        ),
    ],
)
def test_what_the_pass_loop_cannot_follow_is_refused_by_name(cls, config, message):
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if cls is not LlamaMTPForCausalLM and hasattr(config, name):
            setattr(config, name, 0.0)
    with pytest.raises(ValueError, match=message):
        cls(config)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (Qwen3MTPForCausalLM, Qwen3Config(**MAIN, **WINDOW | {"use_sliding_window": False})),
        (Qwen3MTPForCausalLM, Qwen3Config(**MAIN, **WINDOW | {"max_window_layers": 2})),
        (Qwen3MTPForCausalLM, Qwen3Config(**MAIN, **WINDOW | {"sliding_window": None})),
        (MistralMTP, MistralConfig(**MAIN, sliding_window=None)),
        (GemmaMTP, GemmaConfig(**MAIN, head_dim=8)),
        (GraniteMTP, GraniteConfig(**MAIN, embedding_multiplier=3.0, residual_multiplier=0.5)),
        (CohereMTP, CohereConfig(**MAIN, logit_scale=1.0)),
        (
            LlamaMTPForCausalLM,
            LlamaConfig(**MAIN, rope_parameters=DYNAMIC | {"rope_type": "linear"}),
        ),
    ],
)
def test_a_main_whose_layers_attend_to_everything_passes(cls, config):
    torch.manual_seed(0)
    check_slow_mode(cls(config))


def test_the_guard_holds_where_a_checkpoint_is_opened(tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    slides = text.replace('"use_sliding_window": false', '"use_sliding_window": true')
    slides = slides.replace('"sliding_window": null', '"sliding_window": 8')
    (tmp_path / "config.json").write_text(
        slides.replace('"full_attention"', '"sliding_attention"', 1)
    )
    with pytest.raises(ValueError, match="layer_types .* got 0: sliding_attention"):
        Qwen3MTPForCausalLM.from_pretrained(tmp_path)


def test_the_guard_holds_where_a_run_begins(tmp_path):
    folder = save_toy(tmp_path, attention_bias=False, rope_parameters=DYNAMIC)
    with pytest.raises(ValueError, match="rope_type must not be dynamic"):
        build_toy(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_families_pass_the_comparison_in_each_precision(family, attention, dtype):
    model = tiny_model(family).to(dtype)
    model.config._attn_implementation = attention
    check_slow_mode(model)


def slide(monkeypatch, model):
    """Make the stock forward attend to the last 8 tokens only, and the config not say so."""
    forward = type(model.model).forward

    def sliding(self, input_ids, attention_mask=None, past_key_values=None, **kwargs):
        if past_key_values is None:
            index = torch.arange(input_ids.shape[1])
            distance = index[:, None] - index
            attention_mask = ((distance >= 0) & (distance < 8))[None, None]
        return forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )

    monkeypatch.setattr(type(model.model), "forward", sliding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_comparison_finds_a_window_that_no_field_names(monkeypatch, dtype):
    model = tiny_model().to(dtype)
    slide(monkeypatch, model)
    with pytest.raises(ValueError, match="same logits in the pass loop as by its stock forward"):
        check_slow_mode(model)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.1


class Capped(nn.Linear):
    def forward(self, x):
        return 3 * torch.tanh(super().forward(x) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [Scaled, Capped])
def test_the_comparison_finds_a_quirk_of_the_output_layer_that_no_field_names(layer, dtype):
    model = tiny_model().to(dtype)
    model.lm_head.__class__ = layer
    with pytest.raises(ValueError, match="last hidden rows times its output matrix"):
        check_slow_mode(model)


def test_weights_that_are_not_finite_are_refused():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="must give finite logits"):
        check_slow_mode(model)


def test_the_comparison_leaves_no_trace():
    model = tiny_model().train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_slow_mode(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.lm_head.training
    with torch.device("meta"):
        empty = LlamaMTPForCausalLM(LlamaConfig(**MAIN))
    check_slow_mode(empty)


def test_a_nested_config_is_read_where_its_text_model_is():
    class Outer(LlamaConfig):
        def get_text_config(self, *args, **kwargs):
            return Qwen3Config(**MAIN, **WINDOW)

    with pytest.raises(ValueError, match="sliding_window=8"):
        check_config(Outer(**MAIN))
