"""A model of random weights in a folder that transformers opens, for benchmarks without a network.

    python benchmarks/random_model.py 0.5b FOLDER

writes a Qwen2 of a size of `mtp plan --main` in bfloat16, with a tokenizer of bytes. Speed depends
on shapes and not on weights, so benchmarks may use it in place of a trained one.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from mtp.plan.shapes import MAINS, MainShape, llama  # noqa: E402

TINY = llama(64, 176, 3, 4, 2, 9000, True)
SIZES = {"tiny": TINY, **MAINS}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_tokenizer(folder: Path) -> None:
    """Save a tokenizer with a token for each byte, and one that ends and pads texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)


def write(main: MainShape, folder: Path) -> None:
    """Save config, random weights and the tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **main.fields,
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    write(SIZES[given.size], given.folder)
    print(f"{given.size}: {SIZES[given.size].parameters:,} weights in {given.folder}")


if __name__ == "__main__":
    main()
