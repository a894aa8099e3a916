"""Random models small enough for a test, and the ids that they speak."""

from dataclasses import asdict

import torch

from mtp.batch import pad
from mtp.generation_mtp import Sampler, decode
from mtp.modeling_mtp import FAMILIES, HeadConfig

EOS, CLOSE, PAD = 1, 2, 0
VOCABULARY = 23
GREEDY = Sampler(temperature=0)


HEADS = ("eavesdrop", "parallel", "eavesdrop that recalls", "parallel that recalls")
"""What `tiny_model` takes as the type of a head."""


def tiny_model(
    family: str = "llama",
    *,
    type: str = "eavesdrop",
    tied: bool = False,
    seed: int = 0,
    **head: object,
):
    """A random model of a few thousand parameters whose tokens vary from position to position."""
    torch.manual_seed(seed)
    cls = FAMILIES[family]
    config = cls.config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.25,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    kind, _, recalls = type.partition(" that ")
    settings = {"type": kind, "recall": bool(recalls), "num_slots": 3, "hidden_size": 16}
    settings |= {"intermediate_size": 24, **head}
    config.mtp = asdict(HeadConfig(**settings))
    return cls(config).eval()


def run(model, prompts, plan, sampler=GREEDY, seed=0, max_new_tokens=24, **options):
    """Decode prompts of different lengths."""
    tokens, lengths = pad(prompts, PAD)
    return decode(
        model,
        tokens,
        lengths,
        plan,
        sampler,
        max_new_tokens=max_new_tokens,
        pad_id=PAD,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def head_rows(model, taps, block):
    """[K, E] the head's rows behind a text by the definition: its taps [1, T, taps, D], and the
    tokens that the last pass has drawn so far.
    """
    head, recalled = model.mtp_head, None
    if head.recall is not None:
        recalled = head.recall(head.message(taps))[:, -1]
    embeds = model.head_embed(torch.tensor([block]))
    return head(head.message(taps[:, -1]), embeds, recalled)[0]


def completions(out):
    """The new tokens of each row."""
    return [out.tokens[r, : out.lengths[r]].tolist() for r in range(len(out.tokens))]
