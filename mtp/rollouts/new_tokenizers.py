"""Tokenizers for models that are trained from scratch: of characters, or of frequent text pieces.

Both have `<pad>`, `<eos>`, and one token for each delimiter.
"""

from collections.abc import Container, Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .tokenization import add_delimiters

PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SPECIAL = ["<pad>", "<eos>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def character_tokenizer(alphabet: str, delimiters: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of a closed alphabet."""
    check_delimiters(delimiters, alphabet)
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *delimiters, *sorted(set(alphabet))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return finished(core, delimiters)


def text_tokenizer(
    texts: Iterable[str], vocab_size: int, delimiters: list[str]
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the most frequent pieces of some texts (Sennrich et al. 2016).

    Every text can be written in it, byte by byte if need be. A digit is always a token of its own.
    vocab_size: number of tokens, delimiters included; fewer if the texts have fewer pieces.

    Raises ValueError if `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    check_delimiters(delimiters, BYTES)
    fixed = [*SPECIAL, *delimiters]
    least = len(fixed) + len(BYTES)
    if vocab_size < least:
        raise ValueError(
            f"model.tokenizer_vocab_size must be at least {least}, the {len(BYTES)} bytes and "
            f"{len(fixed)} special tokens, got {vocab_size}"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=fixed, initial_alphabet=BYTES, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return finished(core, delimiters)


def check_delimiters(delimiters: list[str], characters: Container[str]) -> None:
    """Raises ValueError for a delimiter that text or another special token would be read as."""
    for delimiter in delimiters:
        if delimiter in (*SPECIAL, "") or delimiter in characters:
            raise ValueError(
                f"delimiter {delimiter!r} must be a token of its own, neither <pad>, <eos> nor a "
                "character of the task; choose another in decoding.phases"
            )


def finished(core: Tokenizer, delimiters: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer for transformers, with a chat template that writes contents as they are."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    add_delimiters(tokenizer, delimiters)
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer
