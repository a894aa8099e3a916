"""Tiny random models of many families, of which every field that matters is other than neutral.

Windows and chunks are of 8 tokens, softcaps of 3, scales other than 1, biases random.
"""

from dataclasses import asdict
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from mtp.modeling.contract import without_dropout
from mtp.modeling.heads import HeadConfig
from mtp.modeling.modeling_mtp import family_class

VOCABULARY, PAD, EOS, WINDOW = 29, 0, 1, 8

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": WINDOW}
MIXED = SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
}
SHARED = {
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = (
    EXPERTS
    | SHARED
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    }
)
INDEXED = LATENT | {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 6, "head_dim": 4}
GRANITE = HEADS | {
    "logits_scaling": 4.0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "mamba_n_groups": 1,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
CAPPED = {"final_logit_softcapping": 3.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": HEADS | EXPERTS | SHARED | MIXED | {"num_dense_layers": 1},
    "apertus": HEADS,
    "arcee": HEADS,
    "biogpt": {},
    "bitnet": HEADS,
    "bloom": {"n_head": 4, "n_layer": 3},
    "codegen": {"n_head": 4, "rotary_dim": 4, "n_ctx": 256},
    "cohere": HEADS | {"logit_scale": 0.25},
    "cohere2": HEADS | MIXED | {"logit_scale": 0.25},
    "cohere2_moe": HEADS | EXPERTS | MIXED | {"logit_scale": 0.25},
    "ctrl": {"n_embd": 32, "dff": 48, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "cwm": HEADS | MIXED | {"bos_token_id": 2},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": INDEXED,
    "diffllama": HEADS,
    "doge": HEADS | {"keep_window_size": WINDOW},
    "dots1": HEADS | EXPERTS | SHARED | MIXED,
    "ernie4_5": HEADS,
    "ernie4_5_moe": HEADS | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "exaone4": HEADS | MIXED,
    "exaone_moe": HEADS | EXPERTS | SHARED | MIXED,
    "falcon": {"multi_query": True, "alibi": False, "new_decoder_architecture": False},
    "flex_olmo": HEADS | EXPERTS,
    "gemma": HEADS,
    "gemma2": HEADS | MIXED | CAPPED | {"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 9},
    "gemma3_text": HEADS | MIXED | CAPPED | {"query_pre_attn_scalar": 9},
    "gemma3n_text": HEADS
    | MIXED
    | CAPPED
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": HEADS
    | CAPPED
    | SLIDING
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    },
    "glm": HEADS | {"partial_rotary_factor": 0.5},
    "glm4": HEADS | {"partial_rotary_factor": 0.5},
    "glm4_moe": HEADS | EXPERTS | SHARED,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": INDEXED,
    "gpt2": {"n_head": 4, "n_layer": 3, "n_embd": 32, "n_positions": 256},
    "gpt_bigcode": {"n_head": 4, "n_layer": 3, "n_embd": 32, "n_positions": 256},
    "gpt_neo": {
        "num_hidden_layers": 4,
        "num_heads": 4,
        "window_size": WINDOW,
        "attention_types": [[["global", "local"], 2]],
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "gpt_oss": HEADS | EXPERTS | MIXED,
    "gptj": {"n_head": 4, "n_layer": 3, "n_embd": 32, "rotary_dim": 4},
    "granite": GRANITE,
    "granite_swa": GRANITE | MIXED,
    "granitemoe": GRANITE | EXPERTS,
    "granitemoeshared": GRANITE | EXPERTS,
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS | EXPERTS | {"moe_topk": 2},
    "hy_v3": HEADS | EXPERTS | SHARED,
    "hyperclovax": HEADS | {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    "internlm3": HEADS,
    "jais2": HEADS,
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8} | EXPERTS,
    "llama": HEADS,
    "llama4_text": HEADS
    | EXPERTS
    | {
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 48,
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "interleave_moe_layer_step": 2,
    },
    "longcat_flash": LATENT
    | {
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "head_dim": 4,
    },
    "mellum": HEADS | EXPERTS | MIXED,
    "mimo_v2_flash": HEADS | EXPERTS | SHARED | MIXED | {"v_head_dim": 6},
    "minicpm3": LATENT | {"dim_model_base": 8, "scale_emb": 3},
    "minimax_m2": HEADS | EXPERTS,
    "ministral": HEADS | MIXED,
    "ministral3": HEADS | SLIDING,
    "mistral": HEADS | SLIDING,
    "mixtral": HEADS | EXPERTS | SLIDING,
    "modernbert-decoder": {
        "bos_token_id": 2,
        "local_attention": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mpt": {"n_heads": 4, "n_layers": 3, "d_model": 32, "max_seq_len": 256, "expansion_ratio": 2},
    "nanochat": HEADS | CAPPED,
    "nemotron": HEADS,
    "olmo": HEADS,
    "olmo2": HEADS,
    "olmo3": HEADS | MIXED,
    "olmoe": HEADS | EXPERTS,
    "openai-gpt": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": HEADS,
    "phi3": HEADS | SLIDING,
    "phimoe": HEADS | EXPERTS | SLIDING | {"lm_head_bias": True},
    "qwen2": HEADS | SLIDING | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": HEADS | EXPERTS | SLIDING | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": HEADS | SLIDING | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": HEADS | EXPERTS | SLIDING | {"use_sliding_window": True},
    "seed_oss": HEADS,
    "smollm3": HEADS | SLIDING | {"use_sliding_window": True, "no_rope_layers": [1, 0, 1]},
    "solar_open": HEADS | EXPERTS | SHARED,
    "stablelm": HEADS,
    "starcoder2": HEADS | SLIDING,
    "vaultgemma": HEADS | MIXED | CAPPED | {"query_pre_attn_scalar": 9},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
    "youtu": LATENT,
    # A state that is not one entry a position.
    "bamba": HEADS | MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": HEADS | MAMBA | {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64},
    "falcon_mamba": {"state_size": 8},
    "granitemoehybrid": GRANITE
    | EXPERTS
    | MAMBA
    | {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": HEADS
    | EXPERTS
    | {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": HEADS | {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": HEADS
    | EXPERTS
    | {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "minimax": HEADS
    | EXPERTS
    | {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "block_size": 16,
    },
    "nemotron_h": HEADS
    | EXPERTS
    | {
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo_hybrid": HEADS | DELTA,
    "qwen3_5_text": HEADS | DELTA,
    "qwen3_next": HEADS | EXPERTS | DELTA,
    "recurrent_gemma": HEADS
    | {
        "lru_width": 32,
        "attention_window_size": WINDOW,
        "logits_soft_cap": 3.0,
        "block_types": ["recurrent", "attention"],
        "num_hidden_layers": 4,
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 256, "rescale_every": 0},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1],
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "adapter_rank": 4,
        "num_mem_blocks": 1,
    },
}
"""`config.model_type` -> fields of a tiny config beside `SIZES`."""


def tiny_family(model_type: str, **head: Any) -> Any:
    """A random model of a family, with a head, whose tokens vary from position to position."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**SIZES | FAMILIES[model_type])
    without_dropout(config)
    settings = {"num_slots": 3, "hidden_size": 16, "intermediate_size": 24, **head}
    config.mtp = asdict(HeadConfig(**settings))
    model = family_class(model_type)(config).eval()
    with torch.no_grad():
        # A row of zeros ties all scores of a family that selects positions by score.
        rows = model.get_input_embeddings().weight
        rows[PAD] = rows[PAD + 2].flip(0)
        # So does a router that begins at zero: some experts would get no token.
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight") and not parameter.any():
                parameter.normal_()
        bias = model.get_output_embeddings().bias
        if bias is not None:
            bias.normal_()
    return model
