"""A checkpoint as users have them: a byte-level BPE tokenizer and a random Llama of two layers."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mtp.hub.build import ModelConfig, build_model
from mtp.modeling.heads import HeadConfig
from mtp.modeling.phases import Phase
from mtp.rollouts.rollout import DecodingConfig
from mtp.tasks.running_sum import RunningSumConfig

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINK = ["<think>", "</think>"]
PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>"),
    "answer": Phase(mode="slow", opened_by="</think>"),
}
HEAD = {"num_slots": 3, "hidden_size": 16, "intermediate_size": 24}


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """About 300 tokens: the bytes, a few merges, and `<|im_start|>`, `<|im_end|>`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["what is 12+34= the sum of these numbers is 46"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_toy(folder: Path, *, rows: int = 0, **config: object) -> Path:
    """Write the checkpoint; `rows` more than the tokenizer has ids are in its matrices."""
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    given = SIZES | {"vocab_size": len(tokenizer) + rows, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**given | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_toy(folder: Path, *, head: dict | None = None, **model: object):
    """mtp's model and text format of the checkpoint."""
    return build_model(
        ModelConfig(source=str(folder), **{"add_tokens": THINK, **model}),
        HeadConfig(**HEAD | (head or {})),
        DecodingConfig(phases=PHASES),
        RunningSumConfig().build(),
    )
