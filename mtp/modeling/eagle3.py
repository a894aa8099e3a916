"""The draft head of EAGLE-3 (Li et al., arXiv 2503.01840), as servers of speculative decoding know.

Three taps of main at a position are projected to one vector, the position's features. One
transformer layer reads pairs of features and the following token, see `pairs.py`. Training unrolls
the slots, so the head learns from its own features too (the paper's training-time test).

The head may write a part of the vocabulary only, the draft vocabulary: `lm_head` has a row for each
of its tokens, and all others have probability 0. `d2t` [W] int64 is the token's id minus its row,
`t2d` [V] bool is True for its tokens, as in the paper's code.

Weights have the names and shapes of the paper's code. Left out: more than one layer, fewer key
than query heads, biases, and a norm before the residual connection.

Ships with checkpoints: imports torch, transformers and siblings only.

Shapes: B texts, G cells (anchors, padded to the same number M for each text), J slots, S positions
of a text that are kept, D main width, H head width, d width of an attention head, W draft
vocabulary, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, initialization

from .heads import HeadConfig, HeadLinear, HeadRMSNorm
from .pairs import PairHead

NORM_EPS = 1e-6
"""Epsilon of the norms."""


@dataclass(kw_only=True)
class Eagle3Options:
    """Settings in `head.options` of `head.type=eagle3`."""

    draft_vocab_size: int = 0
    """Number of tokens that the head can write, W; 0: all, by main's output layer if it is
    shared."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding's wavelengths."""

    def __post_init__(self) -> None:
        size, theta = self.draft_vocab_size, self.rope_theta
        if type(size) is not int or size < 0:
            raise ValueError(
                f"head.options.draft_vocab_size must be a whole number, 0 (all) or above, got "
                f"{size!r}"
            )
        if type(theta) not in (int, float) or not 1 < theta < 1e12:
            raise ValueError(
                f"head.options.rope_theta must be a number between 1 and 1e12, got {theta!r}"
            )


def rotated(states: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864), halves as in Llama.

    states [., heads, J, d], position [., J].
    """
    half = states.shape[-1] // 2
    exponent = torch.arange(half, device=states.device, dtype=torch.float32) / half
    angle = (position[..., None] * theta**-exponent)[:, None]
    cos, sin = angle.cos().repeat(1, 1, 1, 2), angle.sin().repeat(1, 1, 1, 2)
    turned = torch.cat([-states[..., half:], states[..., :half]], -1)
    return (states * cos + turned * sin).to(states.dtype)


class Eagle3Head(PairHead):
    """One layer over the pairs of main's features and the following token."""

    options_class = Eagle3Options

    d2t: Tensor
    t2d: Tensor

    def __init__(self, settings: HeadConfig, config: PretrainedConfig, num_taps: int):
        super().__init__(settings, config, num_taps)
        width, inner, main_width = (
            settings.hidden_size,
            settings.intermediate_size,
            config.hidden_size,
        )
        if settings.shared_embeddings and width != main_width:
            raise ValueError(
                f"head.hidden_size must be main's width {main_width} for head.type=eagle3, which "
                f"reads main's embeddings, got {width}; set it to {main_width}, or "
                "head.shared_embeddings=false"
            )
        options: Eagle3Options = settings.read_options()
        self.num_heads, self.theta = settings.num_attention_heads, float(options.rope_theta)
        self.fc = HeadLinear(num_taps * main_width, width)
        self.hidden_norm, self.input_layernorm, self.post_attention_layernorm, self.norm = (
            HeadRMSNorm(width, eps=NORM_EPS) for _ in range(4)
        )
        self.q_proj, self.k_proj, self.v_proj = (HeadLinear(2 * width, width) for _ in range(3))
        self.o_proj = HeadLinear(width, width)
        self.gate_proj, self.up_proj = (HeadLinear(width, inner) for _ in range(2))
        self.down_proj = HeadLinear(inner, width)
        size = options.draft_vocab_size
        if size > config.vocab_size:
            raise ValueError(
                f"head.options.draft_vocab_size must be at most main's {config.vocab_size} tokens, "
                f"got {size}; lower it, or set 0 for all"
            )
        if not settings.shared_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if size or not settings.shared_embeddings:
            self.lm_head = HeadLinear(width, size or config.vocab_size)
        if size:
            self.register_buffer("d2t", torch.zeros(size, dtype=torch.int64))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @classmethod
    def check_settings(cls, settings: HeadConfig) -> None:
        if settings.num_layers != 1:
            raise ValueError(
                f"head.num_layers must be 1 for head.type=eagle3, got {settings.num_layers}"
            )
        if settings.recall:
            raise ValueError(
                "head.recall must be false for head.type=eagle3, which attends to all earlier "
                "positions, got true"
            )
        if settings.hidden_size // settings.num_attention_heads % 2:
            raise ValueError(
                "head.hidden_size must be an even multiple of head.num_attention_heads="
                f"{settings.num_attention_heads} for head.type=eagle3, got {settings.hidden_size}"
            )

    @staticmethod
    def default_taps(num_hidden_layers: int) -> list[int]:
        """A low, a middle and a high layer, those of the paper's code where main is deep enough.

        The last one is left out: servers do not give it to a draft head.
        """
        last = num_hidden_layers
        if last >= 7:
            return [2, last // 2, last - 3]
        return sorted({1, max(1, last // 2), max(1, last - 1)})

    @property
    def draft_tokens(self) -> Tensor | None:
        d2t = self._buffers.get("d2t")
        return None if d2t is None else d2t + torch.arange(len(d2t), device=d2t.device)

    def init_buffers(self) -> None:
        """Begin with the tokens of the lowest ids, where no checkpoint has the vocabulary."""
        if self.draft_tokens is not None:
            first = torch.arange(len(self.t2d), device=self.t2d.device) < len(self.d2t)
            initialization.zeros_(self.d2t)
            initialization.copy_(self.t2d, first)

    @torch.no_grad()
    def set_draft_tokens(self, tokens: list[int]) -> None:
        """Make `tokens` the draft vocabulary.

        Raises ValueError unless they are `draft_vocab_size` different tokens of main.
        """
        chosen = torch.tensor(sorted(set(tokens)), dtype=torch.int64)
        size, most = len(self.d2t), len(self.t2d)
        if len(chosen) != size or len(tokens) != size or chosen[0] < 0 or chosen[-1] >= most:
            raise ValueError(
                f"the draft vocabulary must be head.options.draft_vocab_size={size} different "
                f"tokens from 0 to {most - 1}, got {len(tokens)}, {len(chosen)} of them different, "
                f"from {chosen[0]} to {chosen[-1]}"
            )
        self.d2t.copy_(chosen - torch.arange(size))
        self.t2d.zero_()
        self.t2d[chosen] = True

    def resize_vocabulary(self, vocab_size: int) -> None:
        """Follow a change of main's number of tokens; new ones are not in the draft vocabulary.

        Raises ValueError if a token of the draft vocabulary is no longer one of main's.
        """
        if bool(self.t2d[vocab_size:].any()):
            raise ValueError(
                f"main must keep the {int(self.t2d.nonzero().max()) + 1} tokens that hold the "
                f"head's draft vocabulary, got {vocab_size}; give a larger size"
            )
        more = max(0, vocab_size - len(self.t2d))
        self.t2d = F.pad(self.t2d[:vocab_size], (0, more))

    def attention_states(
        self, features: Tensor, embeds: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [., heads, J, d] of pairs: features and embeddings [., J, H] at
        position [., J] of the features.
        """
        pairs = torch.cat([self.input_layernorm(embeds), self.hidden_norm(features)], -1)
        queries, keys, values = (
            proj(pairs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        theta = self.theta
        return rotated(queries, position, theta), rotated(keys, position, theta), values

    def features(self, taps: Sequence[Tensor]) -> Tensor:
        return self.fc(torch.cat(list(taps), -1))

    def keys_and_values(
        self, features: Tensor, embeds: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, keys, values = self.attention_states(features, embeds, position - 1)
        return keys, values

    def step(
        self, context: list[Tensor], embeds: Tensor, slot: int, state: Any
    ) -> tuple[Tensor, Any]:
        features, position, keys, values = context
        features, *own = [features] if state is None else state
        rows = []
        for number, embed in enumerate(embeds.unbind(1), slot):
            pair = features[:, None], embed[:, None], (position + number)[:, None]
            query, *new = self.attention_states(*pair)
            own = [torch.cat(parts, 2) for parts in zip(own, new, strict=True)] if own else new
            mixed = attend(query, own[0], own[1], keys, values, position)
            features = features + self.o_proj(mixed)
            x = self.post_attention_layernorm(features)
            features = features + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
            rows.append(self.norm(features))
        return torch.stack(rows, 1), [features, *own]


def attend(
    query: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
) -> Tensor:
    """Attention of one slot of each cell, over its text and its own slots: [G, H].

    query [G, heads, 1, d]; own_keys and own_values [G, heads, J, d] of the slots up to this one;
    keys and values [B, heads, S, d] of the texts, G / B cells each; position [G] of the anchors.

    Entry p of a text is the pair whose token is at p, so a slot reads entries 1 to its anchor's
    position. Position 0 has no features before it.
    """
    num_texts, num_heads, length, width = keys.shape
    by_text = query.view(num_texts, -1, num_heads, width).transpose(1, 2)  # [B, heads, M, d]
    scores = (by_text.to(keys.dtype) @ keys.transpose(2, 3)).float()
    entry = torch.arange(length, device=keys.device)
    is_read = (entry > 0) & (entry <= position.view(num_texts, 1, -1, 1))
    scores = scores.masked_fill(~is_read, -torch.inf).transpose(1, 2).flatten(0, 1)
    own_scores = (query.float() * own_keys.float()).sum(-1)  # [G, heads, J]
    weights = (torch.cat([scores, own_scores], -1) * width**-0.5).softmax(-1).to(values.dtype)
    of_text, of_own = weights.split([length, own_scores.shape[-1]], -1)
    grouped = of_text.view(num_texts, -1, num_heads, length).transpose(1, 2)
    mixed = (grouped @ values).transpose(1, 2).reshape(len(query), num_heads, width)
    return (mixed + (of_own[..., None] * own_values).sum(2)).flatten(1)
