"""The head alone as an EAGLE-3 draft model, in the layout of the paper's code, which SGLang opens.

    config.json          LlamaForCausalLMEagle3, a Llama of one layer
    model.safetensors    fc, midlayer.*, norm, lm_head, d2t (id minus row), t2d

SGLang gives a draft model main's embeddings, and drops tensors that it has no place for without a
word: the names written here are checked against those that it reads.

SGLang's layer i is Hugging Face's `hidden_states[i + 1]`. The state after the last layer is
refused, since servers do not give it to a draft model.

Left out: main, which `--format main` writes, and heads of other types, which servers do not know.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...modeling.eagle3 import NORM_EPS, Eagle3Head
from ...modeling.matrices import plain_matrix
from ...modeling.output_layer import OutputLayer
from ...rollouts.prompt_format import PromptFormat
from .base import export_dtype

NUM_TAPS = 3
"""Layers of main that servers give to a draft model."""
LAYER = (
    "hidden_norm",
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""Modules of the layer, by the names of the paper's code."""
OUTSIDE = ("fc", "norm", "lm_head")
"""Modules outside the layer."""


def write(model: Any, fmt: PromptFormat, folder: Path, config: Any) -> None:
    """Write the head's weights and settings.

    Raises ValueError for a head that a server would decode otherwise than mtp.
    """
    head = eagle3_head(model, "eagle3")
    if not model.mtp_settings.shared_embeddings:
        raise ValueError(
            "--format eagle3 must be given a head with head.shared_embeddings=true, because SGLang "
            "replaces a draft model's embeddings by main's; use --format speculators"
        )
    if 0 in model.mtp_taps:
        raise ValueError(
            f"--format eagle3 must be given a head with head.taps of at least 1, got "
            f"{model.mtp_taps}: SGLang counts layers from the output of the first; use --format "
            "speculators, or train with other taps"
        )
    dtype = export_dtype(config)
    weights = draft_weights(model, head, dtype, "midlayer.")
    settings = layer_config(model, dtype) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": len(weights["d2t"]),
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in model.mtp_taps],
        },
    }
    write_draft(folder, settings, weights, allowed_names("midlayer."))


def eagle3_head(model: Any, format: str) -> Eagle3Head:
    """The head of a model. Raises ValueError if it is not one that servers decode as mtp does."""
    head = model.mtp_head
    if not isinstance(head, Eagle3Head):
        raise ValueError(
            f"--format {format} must be given a model with head.type=eagle3, got "
            f"{model.mtp_settings.type}, which servers do not know; use --format huggingface"
        )
    last = model.main_config.num_hidden_layers
    if len(model.mtp_taps) != NUM_TAPS or last in model.mtp_taps:
        raise ValueError(
            f"--format {format} must be given a head with {NUM_TAPS} head.taps below {last}, the "
            f"state after the last layer, got {model.mtp_taps}: servers give no others to a draft "
            "model; train with other taps"
        )
    # A family that scales its embeddings has a module of its own, which no server applies here.
    plain_matrix(model.get_input_embeddings(), f"main's embedding (for --format {format})")
    return head


def allowed_names(layer: str) -> set[str]:
    """Names of the tensors of a draft model; `layer`: beginning of those of its layer."""
    modules = [*OUTSIDE, *(f"{layer}{module}" for module in LAYER)]
    return {f"{module}.weight" for module in modules} | {"d2t", "t2d"}


def draft_weights(
    model: Any, head: Eagle3Head, dtype: torch.dtype | None, layer: str
) -> dict[str, Tensor]:
    """Tensors of the head by the names of the paper's code; `layer`: beginning of its layer's.

    Raises ValueError for an output layer that is more than a matrix.
    """
    output: OutputLayer = model.output_layers()[1]
    if output.bias is not None or output.softcap is not None:
        raise ValueError(
            "an EAGLE-3 draft model must have an output layer without bias and softcap, but its "
            "head uses main's, which has one; train with head.options.draft_vocab_size"
        )
    named = {"fc": head.fc.weight, "norm": head.norm.weight, "lm_head": output.rows(output.weight)}
    for module in LAYER:
        named[layer + module] = getattr(head, module.rpartition(".")[2]).weight
    weights = {
        f"{name}.weight": weight.detach().to("cpu", dtype or weight.dtype).contiguous()
        for name, weight in named.items()
    }
    size, tokens = len(model.output_layers()[0].weight), head.draft_tokens
    whole = torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.bool)
    d2t, t2d = whole if tokens is None else (head.d2t.cpu(), head.t2d.cpu())
    return weights | {"d2t": d2t.contiguous(), "t2d": t2d.contiguous()}


def layer_config(model: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """Fields of a `LlamaConfig` of one layer that computes what the head does."""
    settings, head, main = model.mtp_settings, model.mtp_head, model.main_config
    fields = {
        "model_type": "llama",
        "vocab_size": len(model.output_layers()[0].weight),
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": settings.num_attention_heads,
        "num_key_value_heads": settings.num_attention_heads,
        "head_dim": settings.hidden_size // settings.num_attention_heads,
        "max_position_embeddings": getattr(main, "max_position_embeddings", None) or 32_768,
        "rope_theta": head.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": head.theta},
        "rms_norm_eps": NORM_EPS,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype or head.fc.weight.dtype).removeprefix("torch."),
    }
    if main.hidden_size != settings.hidden_size:
        fields["target_hidden_size"] = main.hidden_size
    return fields


def write_draft(
    folder: Path, settings: dict[str, Any], weights: dict[str, Tensor], allowed: set[str]
) -> None:
    """Write the two files of a draft model, whose tensors must be `allowed`, all of them."""
    assert weights.keys() == allowed, sorted(weights.keys() ^ allowed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
