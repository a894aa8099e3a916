"""A small tokenizer and a random Llama, as a source that a run may begin from."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def toy_tokenizer(
    *, chat_template=None, bos: bool = False, eos_after: bool = False, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 tokens with `<think>` and `</think>`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["what is the sum of one and two", "12+34=46"] * 4, trainer)
    core.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    if bos or eos_after:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if eos_after else ''}"
        core.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    given = {"eos_token": eos} if eos else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", pad_token="<pad>", **given
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def save_toy(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *, eos_ids=None, positions=256
) -> str:
    """A source folder: the tokenizer and a random Llama of two layers, with its end tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    if eos_ids is not None:
        model.generation_config = GenerationConfig(eos_token_id=eos_ids, pad_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict]) -> str:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
