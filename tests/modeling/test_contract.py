"""A main that the pass loop cannot follow is refused before anything trains."""

import pytest
import torch
from helpers import tiny_model
from toy import SIZES, build_toy, save_toy
from transformers import (
    BartConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from mtp.modeling.contract import check_config, check_slow_mode
from mtp.modeling.modeling_mtp import LlamaMTPForCausalLM, family_class

MAIN = SIZES | {"vocab_size": 23, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**MAIN, rope_parameters=DYNAMIC), "rope_type must not be dynamic"),
        (LlamaConfig(**MAIN, attention_dropout=0.1), r"attention_dropout must be 0 .* got 0\.1"),
        (
            MixtralConfig(**MAIN, output_router_logits=True),
            "output_router_logits must be false .* set it to false",
        ),
        (BartConfig(), "model_type must be a decoder-only LM, got bart, which has an encoder"),
    ],
)
def test_what_the_pass_loop_cannot_follow_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        family_class(config.model_type)(config)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("electra", "must have embeddings of the width of its hidden rows, 32, but theirs is 128"),
        ("prophetnet", "must be a decoder-only LM"),
    ],
)
def test_a_layout_that_the_pass_loop_cannot_follow_is_refused(model_type, message):
    cls = family_class(model_type)
    given = MAIN if model_type == "electra" else {}
    config = cls.config_class(**given, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with pytest.raises(ValueError, match=message):
        cls(config)


def test_classes_are_made_on_demand_for_what_transformers_knows():
    from mtp.modeling import modeling_mtp

    cls = modeling_mtp.GPT2MTPLMHeadModel
    assert cls is family_class("gpt2") and cls.__module__ == modeling_mtp.__name__
    assert modeling_mtp.Gemma2MTPForCausalLM is family_class("gemma2")
    with pytest.raises(AttributeError, match="Gemma2MTP"):
        modeling_mtp.Gemma2MTP  # noqa: B018
    with pytest.raises(ValueError, match="has a causal LM of, got 'vit'"):
        family_class("vit")


def test_the_guard_holds_where_a_run_begins(tmp_path):
    folder = save_toy(tmp_path, attention_bias=False, rope_parameters=DYNAMIC)
    with pytest.raises(ValueError, match="rope_type must not be dynamic"):
        build_toy(folder)


def test_a_pretrained_main_trains_without_its_dropout(tmp_path):
    model, _ = build_toy(save_toy(tmp_path, attention_bias=False, attention_dropout=0.1))
    assert model.config.attention_dropout == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_families_pass_the_comparison_in_each_precision(family, attention, dtype):
    model = tiny_model(family).to(dtype)
    model.set_attn_implementation(attention)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("field", [{"logits_scaling": 1.1}, {"final_logit_softcapping": 1.0}])
def test_the_comparison_finds_a_field_that_the_family_does_not_read(field, dtype):
    model = tiny_model().to(dtype)
    for name, value in field.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match="must give logits that its config says"):
        check_slow_mode(model)


def test_the_comparison_finds_dropout_that_no_field_names():
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(lambda module, args, out: torch.dropout(out, 0.5, module.training))
    with pytest.raises(ValueError, match="same hidden rows in training as in evaluation"):
        check_slow_mode(model)


def test_a_family_that_stops_is_refused_in_one_sentence(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model.model), "forward", lambda self, **kwargs: 1 / 0)
    message = "LlamaMTPForCausalLM must run in the pass loop, but it stops with ZeroDivisionError"
    with pytest.raises(ValueError, match=message):
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
            return Qwen3Config(**MAIN, attention_dropout=0.5)

    with pytest.raises(ValueError, match=r"attention_dropout must be 0 .* got 0\.5"):
        check_config(Outer(**MAIN))
