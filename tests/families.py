"""Tiny random models of the families of causal LMs that transformers knows.

`GENERIC` gives a size to every field of a config that has it. `SPECIAL` has what a family needs
beside: windows of 8 tokens, scales other than 1, softcaps, biases. Output biases are random, since
transformers initializes them with zeros.
"""

from dataclasses import asdict, fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from mtp.modeling.heads import HeadConfig
from mtp.modeling.modeling_mtp import family_class

VOCABULARY, WINDOW = 31, 8
EOS, CLOSE, PAD = 1, 2, 0

GENERIC: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "tie_word_embeddings": False,
    "sliding_window": WINDOW,
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "hidden_dropout": 0.0,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "layerdrop": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "resid_dropout": 0.0,
    "residual_dropout": 0.0,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "num_dense_layers": 1,
    "first_k_dense_replace": 1,
    # Multi-head latent attention: values have another width than keys.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    # Recurrent layers.
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "state_size": 8,
    "conv_kernel": 4,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SLIDES = {"layer_types": ["sliding_attention", "full_attention"]}
CHUNKS = {"layer_types": ["chunked_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
LATENT = {"num_key_value_heads": 4}
ROTARY = {"rotary_dim": 4}
EXTRA: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LINEAR,
    "bamba": {"attn_layer_indices": [1]},
    "codegen": ROTARY,
    "cwm": {"bos_token_id": 0} | SLIDES,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"n_shared_experts": 1} | SLIDES,
    "dots3_note_text": LATENT,
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5} | SLIDES,
    "cohere2_moe": {"logit_scale": 0.5} | SLIDES,
    "exaone4": SLIDES,
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0} | SLIDES,
    "gemma3_text": {"final_logit_softcapping": 3.0} | SLIDES,
    "gemma4_text": {"final_logit_softcapping": 3.0, "vocab_size_per_layer_input": 31} | SLIDES,
    "gpt_oss": SLIDES,
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "granite_swa": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0},
    "granitemoe_swa": {"logits_scaling": 3.0},
    "granitemoehybrid": {"logits_scaling": 3.0} | LINEAR,
    "granitemoeshared": {"logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "inkling_text": {"logits_mup_width_multiplier": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": LINEAR | LATENT | {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": CHUNKS | {"attention_chunk_size": 8, "no_rope_layers": [1, 0]},
    "longcat_flash": LATENT
    | {"num_layers": 2, "num_hidden_layers": 4, "head_dim": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mellum": SLIDES,
    "mimo_v2_flash": SLIDES,
    "minicpm3": LATENT | {"dim_model_base": 16},
    "minimax": LINEAR,
    "ministral": SLIDES,
    "modernbert-decoder": {"bos_token_id": 0} | SLIDES,
    "nanochat": {"final_logit_softcapping": 3.0},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo3": SLIDES,
    "olmo_hybrid": LINEAR,
    "phimoe": {"lm_head_bias": True},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 8,
        "lru_width": 32,
        "logits_soft_cap": 3.0,
    },
    "smollm3": {"use_sliding_window": True} | SLIDES,
    "starcoder2": {"sliding_window": 8},
    "vaultgemma": {"final_logit_softcapping": 3.0} | SLIDES,
    "xlstm": {"num_heads": 4, "output_logit_soft_cap": 3.0},
    "youtu": LATENT,
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "mamba_dt_rank": 4,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8, "lm_head_bias": True},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": ROTARY,
}
"""Fields by `model_type`."""

QUICK = (
    "llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "granite", "phi",
    "gpt2", "mixtral", "llama4_text", "deepseek_v3", "qwen3_next", "lfm2", "mamba2",
)  # fmt: skip
"""Families of the default tests: each kind of mask, output layer, cache and state once."""
SUPPORTED = (
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bailing_hybrid", "bamba",
    "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2", "cohere2_moe", "ctrl", "cwm",
    "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v32", "diffllama", "doge", "dots1",
    "dots3_note_text", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon",
    "falcon_h1", "falcon_mamba", "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text",
    "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite",
    "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
    "helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax",
    "inkling2_text", "inkling_text", "jais2", "jamba", "jetmoe", "kimi_linear", "kolibri1",
    "laguna", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4_text", "mamba", "mamba2", "mellum",
    "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "minimax_m3_vl_text", "ministral",
    "ministral3", "mistral", "mixtral", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo",
    "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe",
    "qwen3_next", "recurrent_gemma", "rwkv", "seed_oss", "smollm3", "solar_open", "stablelm",
    "starcoder2", "vaultgemma", "xglm", "xlstm", "youtu", "zamba", "zamba2", "zaya",
)  # fmt: skip
"""Families that the contract test covers, with a cache or by the slower loop."""
OWN_CACHE_DIFFERS = ("minimax",)
"""Families whose stock forward with a cache differs from that without one, by more than 1 in logits
of the tiny model. The stock `generate` is then compared without its cache."""
REFUSED = (
    "cohere_compass_text", "deepseek_v4", "gemma3n_text", "hy_v4", "longcat_flash",
    "modernbert-decoder", "qwen4_exp_text",
)  # fmt: skip
"""Decoder-only families that cannot be done right."""


def tiny_config(model_type: str) -> Any:
    """The family's config, tiny."""
    cls = CONFIG_MAPPING[model_type]
    known = {f.name for f in fields(cls)} | set(getattr(cls, "attribute_map", {}))
    given = {name: value for name, value in GENERIC.items() if name in known}
    return cls(**given | EXTRA.get(model_type, {}))


def tiny_family(model_type: str, seed: int = 0, **head: Any) -> Any:
    """A random model of a few thousand parameters with a head, in evaluation mode."""
    torch.manual_seed(seed)
    config = tiny_config(model_type)
    settings = {"num_slots": 3, "hidden_size": 16, "intermediate_size": 24, **head}
    config.mtp = asdict(HeadConfig(**settings))
    model = family_class(model_type)(config).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model
