"""Main alone as one GGUF file, which llama.cpp, Ollama and transformers open.

Names of tensors are those of the `gguf` package. Rows of the query and key matrices of Llama are
written in llama.cpp's order, which transformers undoes. Text is that of slow mode: the chat
template opens the first phase, as it did in training.

Left out: quantization (llama.cpp's `llama-quantize` makes smaller files of this one), families
other than those of `FAMILIES`, and tokenizers other than byte-level BPE. For these, write
`--format main` and convert it with llama.cpp's `convert_hf_to_gguf.py`.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from ...modeling.saving import HEAD
from ...rollouts.prompt_format import PromptFormat
from .base import export_dtype, finish_templates

FILE = "model.gguf"
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`config.model_type` -> the name of the architecture in GGUF."""
REMEDY = "write --format main and convert it with llama.cpp's convert_hf_to_gguf.py"


def write(model: Any, fmt: PromptFormat, folder: Path, config: Any) -> None:
    """Write main's weights, settings and tokenizer. Raises ValueError for what GGUF has no place
    for here.
    """
    family = model.config.model_type
    if family not in FAMILIES:
        raise ValueError(
            f"--format gguf must be given a main of {', '.join(sorted(FAMILIES))}, got {family}; "
            f"{REMEDY}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / FILE, FAMILIES[family])
    add_settings(writer, model.config, str(config.name))
    add_tokenizer(writer, fmt, model.config.vocab_size)
    add_weights(writer, model, export_dtype(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_settings(writer: Any, config: Any, name: str) -> None:
    """Add what the architecture needs of main's config. Raises ValueError for settings that it has
    no place for.
    """
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            "--format gguf must be given a main whose rope_parameters.rope_type is default, got "
            f"{rope['rope_type']}; {REMEDY}"
        )
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise ValueError(f"--format gguf must be given a main without attention_bias; {REMEDY}")
    if config.hidden_act != "silu":
        raise ValueError(
            "--format gguf must be given a main whose hidden_act is silu, got "
            f"{config.hidden_act}; write another format"
        )
    window, most = getattr(config, "sliding_window", None), config.max_position_embeddings
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds != {"full_attention"} and window is not None and window < most:
        raise ValueError(
            "--format gguf must be given a main whose sliding_window is null or at least its "
            f"max_position_embeddings of {most}, got {window}; lower max_position_embeddings to it "
            "in config.json, or write another format"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_weights(writer: Any, model: Any, dtype: torch.dtype | None) -> None:
    """Add main's weights: matrices in the run's dtype, vectors in float32."""
    config = model.config
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == writer.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if name.startswith(HEAD) or (tied and name == "lm_head.weight"):
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"--format gguf knows no name for the weight {name}; {REMEDY}")
        if writer.arch == "llama" and ".attn_q." in found:
            weight = permuted(weight, config.num_attention_heads)
        if writer.arch == "llama" and ".attn_k." in found:
            weight = permuted(weight, config.num_key_value_heads)
        values = weight.detach().float().cpu().contiguous().numpy()
        narrow = weight.ndim > 1 and (dtype or weight.dtype) == torch.bfloat16
        if narrow:
            packed = gguf.quants.quantize(values, Kind.BF16)
            writer.add_tensor(found, packed, raw_dtype=Kind.BF16)
        else:
            writer.add_tensor(found, values.astype(np.float32))


def permuted(weight: Tensor, num_heads: int) -> Tensor:
    """Rows [heads * 2 * half, D] of a query or key matrix in llama.cpp's order: the halves of a
    head's width, which rotate together, alternate.
    """
    halves = weight.view(num_heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def add_tokenizer(writer: Any, fmt: PromptFormat, num_rows: int) -> None:
    """Add the tokens, merges, end tokens and chat template of a byte-level BPE tokenizer."""
    tokenizer: Any = fmt.tokenizer
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    if core["model"]["type"] != "BPE" or core["model"].get("byte_fallback"):
        raise ValueError(
            "--format gguf must be given a byte-level BPE tokenizer, got "
            f"{core['model']['type']}; {REMEDY}"
        )
    named = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    marks = fmt.plan().marks - set(fmt.eos_ids)
    tokens, kinds = [], []
    for i in range(num_rows):
        tokens.append(named.get(i, f"[PAD{i}]"))
        kind = gguf.TokenType.NORMAL if i in named else gguf.TokenType.UNUSED
        if i in added:
            shown = i in marks or not added[i].special
            kind = gguf.TokenType.USER_DEFINED if shown else gguf.TokenType.CONTROL
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(core))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = core["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(fmt.turn_end_id)
    writer.add_pad_token_id(fmt.pad_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(bool(fmt.leading_ids))
    with TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        finish_templates(fmt, Path(scratch))
        template = Path(scratch) / "chat_template.jinja"
        if template.is_file():
            writer.add_chat_template(template.read_text())


WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLITS = {
    r"\p{N}{1,3}".join(WORDS): "llama-bpe",
    r"\p{N}".join(WORDS): "qwen2",
}
"""Pattern of a pre-tokenizer -> llama.cpp's name of the pre-tokenizer, which has this pattern."""


def pre_tokenizer(core: dict[str, Any]) -> str:
    """llama.cpp's name of a pre-tokenizer. Raises ValueError for one that it may not know."""
    given = core.get("pre_tokenizer") or {}
    parts = given.get("pretokenizers", [given])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = parts[0]["pattern"].get("Regex", "")
        if pattern in SPLITS:
            return SPLITS[pattern]
        kinds[0] = f"Split by {pattern}"
    raise ValueError(
        "--format gguf must be given a pre-tokenizer of GPT-2, SmolLM, Llama 3 or Qwen 2, got "
        f"{kinds}; {REMEDY}"
    )
