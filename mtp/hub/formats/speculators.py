"""The head alone as an EAGLE-3 draft model in the format of the speculators library and vLLM.

    config.json          Eagle3Speculator: Llama config of the layer, draft vocabulary, taps
    model.safetensors    fc, layers.0.*, norm, lm_head, d2t, t2d; embed_tokens if it has its own

vLLM's layer i is Hugging Face's `hidden_states[i]`, as here.

`vllm serve MAIN --speculative-config '{"model": FOLDER, ...}'` names main itself. The field
`verifier.name_or_path` is main's hub id where a run trained the head alone, and null otherwise.

Left out: main, which `--format main` writes, and heads of other types.
"""

from pathlib import Path
from typing import Any

from ...modeling.contract import stock_class
from ...rollouts.prompt_format import PromptFormat
from ..model_card import base_model
from .base import export_dtype
from .eagle3 import allowed_names, draft_weights, eagle3_head, layer_config, write_draft

VERSION = "0.9.0"
"""Version of the speculators library whose format this is."""


def write(model: Any, fmt: PromptFormat, folder: Path, config: Any) -> None:
    """Write the head's weights and settings.

    Raises ValueError for a head that a server would decode otherwise than mtp.
    """
    head, dtype = eagle3_head(model, "speculators"), export_dtype(config)
    weights, allowed = draft_weights(model, head, dtype, "layers.0."), allowed_names("layers.0.")
    if not model.mtp_settings.shared_embeddings:
        own = head.embed_tokens.weight
        weights["embed_tokens.weight"] = own.detach().to("cpu", dtype or own.dtype).contiguous()
        allowed.add("embed_tokens.weight")
    layer = layer_config(model, dtype)
    settings = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": VERSION,
        "draft_vocab_size": len(weights["d2t"]),
        "norm_before_residual": False,
        "norm_before_fc": False,
        "eagle_aux_hidden_state_layer_ids": list(model.mtp_taps),
        "target_hidden_size": layer.pop("target_hidden_size", None),
        "tie_word_embeddings": False,
        "torch_dtype": layer["torch_dtype"],
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": model.block_size - 1,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": verifier(config),
                "architectures": [stock_class(type(model)).__name__],
            },
        },
    }
    write_draft(folder, settings, weights, allowed)


def verifier(config: Any) -> str | None:
    """Main's hub id; None where the run changed main, or where it has no id."""
    trained = any(stage.train_main for stage in config.active_stages().values())
    return None if trained or config.model.add_tokens else base_model(config.model)[1]
