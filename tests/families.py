"""Tiny random models of the families of causal LMs that transformers knows.

`GENERIC` gives a size to every field of a config that has it. `SPECIAL` has what a family needs
beside: windows of 8 tokens, scales other than 1, softcaps, biases. Output biases are drawn, since
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
    "cohere_compass_text": SLIDES,
    "cwm": {"bos_token_id": 0} | SLIDES,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"n_shared_experts": 1} | SLIDES,
    "dots3_note_text": LATENT,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": ROTARY,
}
"""Fields by `model_type`."""


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
