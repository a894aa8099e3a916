"""Main alone as a GGUF file, for llama.cpp, Ollama and whatever else reads GGUF.

Follows llama.cpp's `convert_hf_to_gguf.py` for two architectures, Llama and Qwen3, with byte-level
BPE tokenizers. The rows of Llama's query and key matrices are reordered: llama.cpp rotates adjacent
pairs of a head's numbers, transformers the first half with the second.

Another tool quantizes the file (`llama-quantize`); this format keeps the dtype of the run.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...rollouts.prompt_format import PromptFormat
from ..model_card import base_model
from .base import prompts_of_training, weights_of_run

FILE = "model.gguf"
ARCHITECTURES = {"llama": "LLAMA", "qwen3": "QWEN3"}
"""Name in `gguf.MODEL_ARCH` of each `model_type`."""

# Regular expressions of pre-tokenizers, and the names that llama.cpp has for them.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE_TOKENIZERS = {
    ("ByteLevel", True): "gpt-2",
    ("Digits", True, "ByteLevel", True): "smollm",
    ("Split", _QWEN2, "ByteLevel", False): "qwen2",
    ("Split", _LLAMA3, "ByteLevel", False): "llama-bpe",
}
"""llama.cpp's name of a pre-tokenizer: its steps, each with the setting that matters."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of a token in llama.cpp."""


def write(model: Any, fmt: PromptFormat, folder: Path, config: Any) -> None:
    """Write `model.gguf`."""
    import gguf

    family = model.config.model_type
    if family not in ARCHITECTURES:
        raise ValueError(
            f"--format gguf must have a main of type {' or '.join(ARCHITECTURES)}, got {family}; "
            "export with --format main and convert that folder by llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"--format gguf must have a main with default rotary positions, got {rope}; export "
            "with --format main and convert that folder by llama.cpp's convert_hf_to_gguf.py"
        )
    folder.mkdir(parents=True, exist_ok=True)
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[family]]
    writer: Any = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[architecture])
    _add_settings(writer, model.config, config)
    _add_tokenizer(writer, fmt, model.config.vocab_size, folder)
    weights = weights_of_run(model, config)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    for name, weight in weights.items():
        if name.startswith("mtp_head.") or (tied and name == "lm_head.weight"):
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(
                f"--format gguf must know every weight of main, got {name}; export with --format "
                "main"
            )
        if family == "llama":
            weight = _adjacent_pairs(name, weight, model.config)
        _add_weight(writer, found, weight.contiguous())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _adjacent_pairs(name: str, weight: Tensor, config: Any) -> Tensor:
    """A matrix [H * d, ...] whose rotated pairs are adjacent, if it is one of queries or keys."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    number = next((n for part, n in heads.items() if f".{part}." in name), None)
    if number is None:
        return weight
    halves = weight.reshape(number, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _add_weight(writer: Any, name: str, weight: Tensor) -> None:
    """Write a weight: vectors in float32, matrices in their own dtype."""
    import gguf

    rows = weight.detach().float().cpu().numpy()
    if weight.ndim > 1 and weight.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(rows, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, rows)


def _add_settings(writer: Any, main: Any, config: Any) -> None:
    """Write main's sizes and where it comes from."""
    import gguf

    _, _, licence = base_model(config.model)
    is_bf16 = str(main.dtype).endswith("bfloat16") or config.fabric.precision.startswith("bf16")
    kind = gguf.LlamaFileType.MOSTLY_BF16 if is_bf16 else gguf.LlamaFileType.ALL_F32
    writer.add_name(config.name)
    if licence:
        writer.add_license(licence)
    writer.add_file_type(kind)
    writer.add_context_length(main.max_position_embeddings)
    writer.add_embedding_length(main.hidden_size)
    writer.add_block_count(main.num_hidden_layers)
    writer.add_feed_forward_length(main.intermediate_size)
    writer.add_head_count(main.num_attention_heads)
    writer.add_head_count_kv(main.num_key_value_heads)
    writer.add_layer_norm_rms_eps(main.rms_norm_eps)
    writer.add_key_length(main.head_dim)
    writer.add_value_length(main.head_dim)
    writer.add_rope_dimension_count(main.head_dim)
    writer.add_rope_freq_base(main.rope_parameters["rope_theta"])
    writer.add_vocab_size(main.vocab_size)


def _add_tokenizer(writer: Any, fmt: PromptFormat, size: int, folder: Path) -> None:
    """Write the vocabulary, the merges and the chat template of training."""
    tokenizer: Any = fmt.tokenizer
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = core["pre_tokenizer"] or {}
    name = PRE_TOKENIZERS.get(_steps(steps))
    if core["model"]["type"] != "BPE" or core["normalizer"] is not None or name is None:
        raise ValueError(
            "--format gguf must have a byte-level BPE tokenizer and a pre-tokenizer that llama.cpp "
            f"names ({', '.join(PRE_TOKENIZERS.values())}), got {core['model']['type']} after "
            f"{steps.get('type')}; export with --format main"
        )
    special = set(tokenizer.all_special_tokens) - set(fmt.delimiters)
    added = {token["id"] for token in core["added_tokens"]}
    texts, kinds = [], []
    by_id = {index: text for text, index in tokenizer.get_vocab().items()}
    for index in range(size):
        text = by_id.get(index, f"[PAD{index}]")
        if index not in by_id:
            kind = UNUSED
        elif index in added:
            kind = CONTROL if text in special else USER_DEFINED
        else:
            kind = NORMAL
        texts.append(text)
        kinds.append(kind)
    merges = core["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(fmt.turn_end_id)
    writer.add_pad_token_id(fmt.pad_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(not fmt.uses_template and bool(fmt.leading_ids))
    if fmt.uses_template:
        tokenizer.save_pretrained(folder)
        prompts_of_training(fmt, folder)
        writer.add_chat_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))
        for path in sorted(folder.iterdir()):
            if path.name != FILE and path.is_file():
                path.unlink()


def _steps(node: dict[str, Any]) -> tuple[Any, ...]:
    """The steps of a pre-tokenizer, each with the setting that matters."""
    if node.get("type") == "Sequence":
        return tuple(part for step in node["pretokenizers"] for part in _steps(step))
    settings = {
        "ByteLevel": node.get("use_regex", True),
        "Digits": node.get("individual_digits"),
        "Split": (node.get("pattern") or {}).get("Regex"),
    }
    return node.get("type"), settings.get(str(node.get("type")))
