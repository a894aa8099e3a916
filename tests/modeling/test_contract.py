"""A main that the pass loop cannot follow is refused before anything trains."""

import pytest
import torch
from families import tiny_config, tiny_family
from helpers import run, tiny_model
from toy import SIZES, build_toy, save_toy
from transformers import BartConfig, LlamaConfig, MixtralConfig, Phi3Config, Qwen3Config

from mtp.modeling import modeling_mtp
from mtp.modeling.contract import check_config, check_slow_mode, longest_text, without_dropout
from mtp.modeling.modeling_mtp import family_class
from mtp.modeling.phases import PhasePlan

LlamaMTPForCausalLM, Qwen3MTPForCausalLM = family_class("llama"), family_class("qwen3")
MAIN = SIZES | {"vocab_size": 23, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**MAIN, attention_dropout=0.1), r"attention_dropout must be 0 .* got 0\.1"),
        (tiny_config("gpt2").__class__(), r"attn_pdrop must be 0 .* got 0\.1"),
        (MixtralConfig(**MAIN, output_router_logits=True), "output_router_logits must be false"),
        (BartConfig(), "model_type must be that of a decoder-only model, got 'bart'"),
    ],
)
def test_what_the_pass_loop_cannot_follow_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        check_config(config)
    without_dropout(config)
    if "dropout" in message or "pdrop" in message:
        check_config(config)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma3n_text", r"hidden states of shape \[1, 20, 32\] at layer 1.* got \[4, 1, 20, 32\]"),
        ("modernbert-decoder", "logits that are its output layer of its last hidden rows"),
    ],
)
def test_a_family_that_does_not_fit_is_refused_by_the_comparison(family, message):
    with pytest.raises(ValueError, match=message):
        check_slow_mode(tiny_family(family))


def test_classes_are_made_by_name_and_once():
    found = modeling_mtp.MistralMTPForCausalLM
    assert found is modeling_mtp.MistralMTPForCausalLM is family_class("mistral")
    assert found.__name__ == "MistralMTPForCausalLM"
    assert modeling_mtp.GPT2MTPLMHeadModel is family_class("gpt2")
    with pytest.raises(AttributeError, match="no attribute 'NoMTPForCausalLM'"):
        _ = modeling_mtp.NoMTPForCausalLM
    with pytest.raises(ValueError, match="model.family must be that of a causal LM.* got 'clip'"):
        family_class("clip", "model.family")


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (LlamaConfig(**MAIN, rope_parameters=DYNAMIC), 256),
        (Phi3Config(**MAIN, **LONG), 32),
        (LlamaConfig(**MAIN, rope_parameters=DYNAMIC | {"rope_type": "linear"}), None),
    ],
)
def test_texts_end_where_rotary_frequencies_change(config, longest):
    assert longest_text(config) == longest


def test_texts_of_variable_frequencies_are_refused_past_their_change():
    torch.manual_seed(0)
    model = family_class("phi3")(Phi3Config(**MAIN, **LONG)).eval()
    check_slow_mode(model)
    plan = PhasePlan([4], [None], [])
    assert run(model, [[5, 6, 7]], plan, max_new_tokens=16).lengths.tolist() == [16]
    with pytest.raises(ValueError, match="at most 32 tokens, got .*rotary frequencies change"):
        run(model, [[5, 6, 7]], plan, max_new_tokens=30)
    with pytest.raises(ValueError, match="at most 32 tokens, got 33"):
        model.replay(torch.ones(1, 33, dtype=torch.int64))


def test_a_checkpoint_with_a_window_opens_with_it(tmp_path):
    torch.manual_seed(0)
    Qwen3MTPForCausalLM(Qwen3Config(**MAIN, **WINDOW)).save_pretrained(tmp_path)
    model = Qwen3MTPForCausalLM.from_pretrained(tmp_path)
    assert model.config.layer_types == ["sliding_attention"] * 2
    check_slow_mode(model)


def test_the_guard_holds_where_a_run_begins(tmp_path):
    folder = save_toy(tmp_path, attention_bias=False, tie_word_embeddings=False)
    text = (folder / "config.json").read_text().replace('"llama"', '"bart"')
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="model_type must be that of a decoder-only model"):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("field", "value"), [("logit_scale", 1.1), ("logits_soft_cap", 3.0)])
def test_the_comparison_finds_an_output_layer_that_is_not_the_configs(field, value, dtype):
    model = tiny_model().to(dtype)
    setattr(model.config, field, value)  # which Llama does not read
    with pytest.raises(ValueError, match="its output layer of its last hidden rows"):
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

    with pytest.raises(ValueError, match="attention_dropout must be 0 .* got 0.5"):
        check_config(Outer(**MAIN))
