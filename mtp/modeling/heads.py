"""The head, which reads main's residual stream: its config, its interface, two types, and recall.

To add a head, derive from `Head` in a file of your own and call `register_head` there. Import that
file before a config is composed or a checkpoint is opened.

Ships with checkpoints: imports torch, transformers and siblings only.

Shapes: R rows of a pass, L tokens read, B texts, T time, N anchors, K head slots, D main width, H
head width, E width of the head's output layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from .matrices import plain_matrix


@dataclass(kw_only=True)
class HeadConfig:
    """The eavesdropping head. Saved as `config.mtp` in a checkpoint's config.json."""

    type: str = "eavesdrop"
    """Type of the head. `eavesdrop`: a causal transformer over the slots of a block. `parallel`:
    one projection of the message per slot, all slots in one step, independent of the block's own
    tokens. `eagle3`: EAGLE-3's draft layer, which attends to all earlier positions (`eagle3.py`).
    `native_mtp`: the MTP layer of main's own family (`native_mtp.py`).
    Or the name of a head that was added with `register_head`."""
    num_slots: int = field(default=5, metadata={"at_least": 1, "at_most": 1000})
    """Number of head tokens per pass, K; a pass yields at most K + 1 tokens."""
    taps: list[int] | None = field(default=None, metadata={"at_least": 0})
    """Layers of main that the head reads, as indices into Hugging Face `hidden_states` (0: the
    embeddings, num_hidden_layers: after the final norm). None: the type's default, usually one
    third, two thirds and the last."""
    hidden_size: int = field(default=96, metadata={"at_least": 1, "at_most": 1_000_000})
    """Width of the head, H."""
    num_layers: int = field(default=1, metadata={"at_least": 1, "at_most": 10_000})
    """Number of layers of an `eavesdrop` head."""
    num_attention_heads: int = field(default=4, metadata={"at_least": 1})
    """Number of attention heads of each layer and of `recall`; a divisor of `hidden_size`."""
    intermediate_size: int = field(default=256, metadata={"at_least": 1, "at_most": 10_000_000})
    """Width of the feed-forward part of each layer of an `eavesdrop` head."""
    shared_embeddings: bool = True
    """Read and write tokens through main's embedding and output matrices. False: the head has its
    own matrices, [V, H], which are cheaper per slot where the vocabulary is large."""
    recall: bool = False
    """Let the head attend to earlier positions, like an induction head: slot j reads the message j
    tokens after positions similar to the anchor. Keeps keys and values of width H for each position
    of the text."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings that only this type of head has: fields of its `options_class`."""

    def resolved_taps(self, num_hidden_layers: int) -> list[int]:
        """The taps, checked against main's depth. Raises ValueError naming the key."""
        if self.taps is None:
            return HEADS[self.type].default_taps(num_hidden_layers)
        bad = [tap for tap in self.taps if not 0 <= tap <= num_hidden_layers]
        if bad or not self.taps:
            raise ValueError(
                f"head.taps must be layers between 0 and {num_hidden_layers} (main has "
                f"{num_hidden_layers} layers), got {self.taps}; leave it null for the default"
            )
        return list(self.taps)

    def validate(self) -> None:
        """Raises ValueError for settings that no head can have."""
        if self.type not in list(HEADS):
            raise ValueError(f"head.type must be one of {sorted(HEADS)}, got {self.type!r}")
        sizes = ("num_slots", "hidden_size", "num_layers", "num_attention_heads")
        for key in (*sizes, "intermediate_size"):
            value = getattr(self, key)
            if type(value) is not int:
                raise ValueError(f"head.{key} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"head.{key} must be at least 1, got {value}")
        for key in ("shared_embeddings", "recall"):
            if type(getattr(self, key)) is not bool:
                raise ValueError(f"head.{key} must be true or false, got {getattr(self, key)!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"head.hidden_size must be a multiple of head.num_attention_heads="
                f"{self.num_attention_heads}, got {self.hidden_size}"
            )
        self.read_options()
        HEADS[self.type].check_settings(self)
        taps = self.taps
        if taps is None:
            return
        if not isinstance(taps, list) or any(type(tap) is not int for tap in taps):
            raise ValueError(f"head.taps must be null or a list of layers, got {taps!r}")
        if len(set(taps)) < len(taps):
            raise ValueError(f"head.taps must name each layer once, got {taps}")

    def read_options(self) -> Any:
        """`options` as the type's `options_class`; None for a type that has none.

        Raises ValueError for settings that the class does not have.
        """
        options_class = HEADS[self.type].options_class
        known = [] if options_class is None else [f.name for f in fields(options_class)]
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            raise ValueError(
                f"head.options must hold settings of head.type={self.type} "
                f"({', '.join(known) or 'it has none'}), got {', '.join(unknown)}; remove it"
            )
        return None if options_class is None else options_class(**self.options)

    def to_checkpoint(self) -> dict[str, Any]:
        """The content of `config.mtp`; `options` is left out where it is empty."""
        saved = asdict(self)
        return saved if self.options else {k: v for k, v in saved.items() if k != "options"}

    @classmethod
    def from_checkpoint(cls, saved: Any) -> "HeadConfig":
        """The settings in `config.mtp`; a field that an older checkpoint lacks has its default.

        Raises ValueError for fields that this version does not know, and as `validate` does.
        """
        if not isinstance(saved, dict):
            raise ValueError(
                f"mtp in config.json must be a mapping of a head's settings, got {saved!r}"
            )
        unknown = sorted(set(saved) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"mtp in config.json holds settings that this version does not know "
                f"({', '.join(unknown)}); open the checkpoint with the version that wrote it"
            )
        settings = cls(**saved)
        settings.validate()
        return settings


class HeadLinear(nn.Linear):
    """A bias-free matrix of the head; its class distinguishes it from main's in initialization."""

    def __init__(self, num_in: int, num_out: int):
        super().__init__(num_in, num_out, bias=False)


class HeadRMSNorm(nn.RMSNorm):
    """RMSNorm in the weight's dtype; torch warns of narrower rows, as under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def slot_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention over the few slots of a block: [N, heads, J or I, d] each.

    The queries are the last J of the I slots. A block has a handful of slots and there are many
    blocks, so products and sums over whole tensors beat one tiny matrix product per block.
    """
    num_new, num_keys = query.shape[2], key.shape[2]
    scores = (query[:, :, :, None] * key[:, :, None]).sum(-1) * query.shape[-1] ** -0.5
    if num_new > 1:
        slot = torch.arange(num_keys, device=query.device)
        scores = scores.masked_fill(slot > slot[num_keys - num_new :, None], -torch.inf)
    return (scores.softmax(-1)[..., None] * value[:, :, None]).sum(-2)


class HeadBlock(nn.Module):
    """A pre-norm transformer layer over the few slots of one block: [N, J, H] -> [N, J, H]."""

    def __init__(self, settings: HeadConfig):
        super().__init__()
        width, inner = settings.hidden_size, settings.intermediate_size
        self.num_heads = settings.num_attention_heads
        self.attn_norm = HeadRMSNorm(width, eps=1e-6)
        self.qkv_proj = HeadLinear(width, 3 * width)
        self.o_proj = HeadLinear(width, width)
        self.mlp_norm = HeadRMSNorm(width, eps=1e-6)
        self.gate_up_proj = HeadLinear(width, 2 * inner)
        self.down_proj = HeadLinear(inner, width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        num, new, width = x.shape
        qkv = self.qkv_proj(self.attn_norm(x)).view(num, new, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, J, H / heads]
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        mixed = slot_attention(query, key, value)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(num, new, width))
        gate, up = self.gate_up_proj(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down_proj(F.silu(gate) * up), (key, value)


class Message(nn.Module):
    """The vector that the head computes from the taps: [N, taps, D] -> [N, H].

    Each tap is first divided by its own root mean square, since the residual stream grows with
    depth.
    """

    def __init__(self, num_taps: int, main_width: int, width: int):
        super().__init__()
        self.proj = HeadLinear(num_taps * main_width, width)
        self.main_width = main_width

    def forward(self, taps: Tensor) -> Tensor:
        return self.proj(F.rms_norm(taps, (self.main_width,), eps=1e-6).flatten(-2))


class Recall(nn.Module):
    """Attention over main's messages at all positions up to the anchor, one value for each slot.

    Slot j at anchor t scores position s <= t - j by its similarity to t, and reads the message of
    position s + j. This is an induction head (Olsson et al., arXiv 2209.11895) with a shift per
    slot: if the text repeats, the message j tokens after the earlier occurrence encodes the token
    of slot j. Hence all slots can continue a copy at once. The anchor's message alone, or attention
    without the shift, does not carry that. j zero key-value pairs are added for slot j, so
    attention can select nothing.

    Example: "A B C ... A" with the anchor at the second A. Slot 1 reads the message at B, slot 2
    the one at C.
    """

    def __init__(self, settings: HeadConfig):
        super().__init__()
        width = settings.hidden_size
        self.num_heads, self.num_slots = settings.num_attention_heads, settings.num_slots
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            HeadLinear(width, width) for _ in range(4)
        )
        self.norm = HeadRMSNorm(width, eps=1e-6)
        self.q_norm = HeadRMSNorm(width // self.num_heads, eps=1e-6)
        self.k_norm = HeadRMSNorm(width // self.num_heads, eps=1e-6)

    def queries(self, messages: Tensor) -> Tensor:
        """[B, T, H] -> [B, heads, T, d]"""
        rows = self.q_proj(self.norm(messages)).unflatten(-1, (self.num_heads, -1))
        return self.q_norm(rows).transpose(1, 2)

    def states(self, messages: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, H] -> keys and values [B, heads, T, d], to be kept for later passes."""
        messages = self.norm(messages)
        keys, values = (
            proj(messages).unflatten(-1, (self.num_heads, -1))
            for proj in (self.k_proj, self.v_proj)
        )
        return self.k_norm(keys).to(values.dtype).transpose(1, 2), values.transpose(1, 2)

    def forward(self, messages: Tensor) -> Tensor:
        """Recall at each position of a text as an anchor: [B, T, H] -> [B, T, K, H]."""
        queries, (keys, values) = self.queries(messages), self.states(messages)
        num = keys.shape[2]
        slots = []
        for slot in range(1, self.num_slots + 1):
            shifted = F.pad(keys, (0, 0, slot, 0))[:, :, :num]
            found = F.pad(values[:, :, slot:], (0, 0, slot, 0))[:, :, :num]
            slots.append(
                F.scaled_dot_product_attention(
                    queries.to(shifted.dtype), shifted, found, is_causal=True, scale=1.0
                )
            )
        return self.o_proj(torch.stack(slots, 3).permute(0, 2, 3, 1, 4).flatten(-2))

    def step(self, message: Tensor, anchors: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Recall at one anchor of each row: message [B, H] at position [B] -> [B, K, H].

        keys and values [B, heads, S, d] are those of positions 0 to S - 1; positions after the
        anchor are not read.
        """
        num_slots, num = self.num_slots, keys.shape[2]
        queries = self.queries(message[:, None]).to(keys.dtype)
        scores = F.pad((queries @ keys.transpose(-1, -2))[:, :, 0], (num_slots, 0))
        shifted = scores.unfold(-1, num, 1)[:, :, :num_slots].flip(2)  # [B, heads, K, S]
        where = torch.arange(num, device=keys.device)
        weights = shifted.masked_fill(where > anchors[:, None, None, None], -torch.inf).softmax(-1)
        slots = torch.arange(1, num_slots + 1, device=keys.device)
        found = weights.masked_fill(where < slots[:, None], 0.0).to(values.dtype) @ values
        return self.o_proj(found.transpose(1, 2).flatten(-2))


Embed = Callable[[Tensor], Tensor]
"""Embeddings of tokens [...] as the head reads them: [..., D or H]."""

Remember = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Writes keys and values [R, heads, L, d] of the tokens of a pass into one of the head's cache
layers (0 to `num_cache_layers` - 1) and returns that layer's from position 0 on, [R, heads, S, d].

Positions after a row's anchor may hold rejected drafts or be empty; later passes overwrite them.
"""


class Head(nn.Module, ABC):
    """A small LM that reads main's taps at an anchor and returns hidden rows for the next K tokens.

    A head may remember past positions, in layers of its own in main's cache. In decoding, `observe`
    receives each pass that main has read, then `context` the anchors; in replay, `replay_context`
    receives whole texts. All three must agree: the context of an anchor depends on the text up to
    it, and not on how the text was divided into passes.

    A context is a list of tensors whose meaning is private to the head. In decoding each has a row
    for each anchor; in replay some may belong to whole texts (see `swapped`).

    Matrices are `HeadLinear` and norms `HeadRMSNorm`, which are initialized for a head. Without
    `settings.shared_embeddings` a head has `lm_head`, and `embed_tokens` if it reads tokens. A head
    that has `lm_head` uses it in place of main's output layer.
    """

    sequential: ClassVar[bool] = True
    """True if slot j reads the token of slot j - 1, so that decoding takes one step per slot."""
    options_class: ClassVar[Any] = None
    """Dataclass of the settings in `head.options`; None for a head that has none. It raises
    ValueError for values that it cannot have."""
    num_cache_layers: int = 0
    """Number of layers of main's cache in which the head keeps keys and values."""

    def __init__(self, settings: HeadConfig, config: PretrainedConfig, num_taps: int):
        """settings: the head's; config: main's; num_taps: the number of tapped layers."""
        super().__init__()
        self.num_slots = settings.num_slots

    @classmethod
    def check_settings(cls, settings: HeadConfig) -> None:
        """Raises ValueError, naming the key, for settings that this type of head cannot have."""

    @staticmethod
    def default_taps(num_hidden_layers: int) -> list[int]:
        """Layers that the head reads where `head.taps` is None."""
        last = num_hidden_layers
        return sorted({max(1, round(last / 3)), max(1, round(2 * last / 3)), last})

    @property
    def draft_tokens(self) -> Tensor | None:
        """[W] ids of the tokens that the head can write, one per row of `lm_head`, ascending; None:
        the whole vocabulary.
        """
        return None

    def observe(
        self, taps: list[Tensor], tokens: Tensor, start: Tensor, embed: Embed, remember: Remember
    ) -> list[Tensor]:
        """Read a pass: taps [R, L, D] each, of tokens [R, L], the first at position `start` [R].

        Returns tensors with R rows, which `context` reads; by default the taps.
        """
        return taps

    @abstractmethod
    def context(self, observed: list[Tensor], at: Tensor, position: Tensor) -> list[Tensor]:
        """The context of one anchor of each row, given what `observe` returned for the pass.

        at [R]: the anchor among the L tokens that were read; position [R]: in the row's text.
        """

    @abstractmethod
    def replay_context(
        self, taps: Tensor, tokens: Tensor, anchors: Tensor, embed: Embed
    ) -> list[Tensor]:
        """The contexts of N anchors of whole texts: taps [B, T, taps, D], tokens [B, T].

        anchors [N]: indices into the flattened B * T positions.
        """

    def swapped(self, context: list[Tensor]) -> list[Tensor]:
        """A context of `replay_context` in which each anchor has the message of another one.

        Half of the anchors further is, with several texts, another text.
        """
        return [part.roll(max(1, len(part) // 2), 0) for part in context]

    @abstractmethod
    def forward(self, context: list[Tensor], embeds: Tensor | None) -> Tensor:
        """All slots at once: embeddings of t_0..t_{K-1} [N, K, .] -> hidden rows [N, K, E].

        embeds is None in decoding where the head is not `sequential`.
        """

    def step(
        self, context: list[Tensor], embeds: Tensor, slot: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Slots from `slot` (0: the head's first) on, given the state of the earlier ones.

        embeds [N, J, .] of the preceding tokens -> hidden rows [N, J, E] and the new state. Called
        for a `sequential` head only.
        """
        raise NotImplementedError


class MessageHead(Head):
    """A head whose context is the message at the anchor and, with `recall`, the result of recall
    there.

    Without `recall` it keeps nothing across passes: main has already read the earlier text.
    """

    def __init__(self, settings: HeadConfig, config: PretrainedConfig, num_taps: int):
        super().__init__(settings, config, num_taps)
        self.message = Message(num_taps, config.hidden_size, settings.hidden_size)
        self.recall = Recall(settings) if settings.recall else None
        self.num_cache_layers = int(settings.recall)

    def observe(
        self, taps: list[Tensor], tokens: Tensor, start: Tensor, embed: Embed, remember: Remember
    ) -> list[Tensor]:
        if self.recall is None:
            return taps
        messages = self.message(torch.stack(taps, 2))
        return [messages, *remember(0, *self.recall.states(messages))]

    def context(self, observed: list[Tensor], at: Tensor, position: Tensor) -> list[Tensor]:
        row = torch.arange(len(at), device=at.device)
        if self.recall is None:
            return [self.message(torch.stack([tap[row, at] for tap in observed], 1))]
        messages, keys, values = observed
        message = messages[row, at]
        return [message, self.recall.step(message, position, keys, values)]

    def replay_context(
        self, taps: Tensor, tokens: Tensor, anchors: Tensor, embed: Embed
    ) -> list[Tensor]:
        if self.recall is None:
            return [self.message(taps.flatten(0, 1)[anchors])]
        messages = self.message(taps)
        recalled = self.recall(messages).flatten(0, 1)[anchors]
        return [messages.flatten(0, 1)[anchors], recalled]


class EavesdropHead(MessageHead):
    """A causal transformer over the slots of one block. Slot j reads t_{j-1} and the message."""

    def __init__(self, settings: HeadConfig, config: PretrainedConfig, num_taps: int):
        super().__init__(settings, config, num_taps)
        width, main_width = settings.hidden_size, config.hidden_size
        self.slot_embed = nn.Embedding(settings.num_slots, width)
        self.layers = nn.ModuleList(HeadBlock(settings) for _ in range(settings.num_layers))
        self.norm = HeadRMSNorm(width, eps=1e-6)
        if settings.shared_embeddings:
            self.in_proj: nn.Module = HeadLinear(main_width, width)
            self.out_proj: nn.Module = HeadLinear(width, main_width)
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, width)
            self.lm_head = HeadLinear(width, config.vocab_size)
            self.in_proj, self.out_proj = nn.Identity(), nn.Identity()

    def forward(self, context: list[Tensor], embeds: Tensor | None) -> Tensor:
        assert embeds is not None
        return self.step(context, embeds, 0, None)[0]

    def step(
        self, context: list[Tensor], embeds: Tensor, slot: int, state: Any
    ) -> tuple[Tensor, Any]:
        message, *recalled = context
        these = slice(slot, slot + embeds.shape[1])
        embeds = F.rms_norm(embeds, embeds.shape[-1:], eps=1e-6)
        slots = plain_matrix(self.slot_embed, "mtp_head.slot_embed")
        x = self.in_proj(embeds) + message[:, None] + slots[these]
        if recalled:
            x = x + recalled[0][:, these]
        new_state = []
        for index, layer in enumerate(self.layers):
            x, kept = layer(x, state[index] if state else None)
            new_state.append(kept)
        return self.out_proj(self.norm(x)), new_state


class ParallelHead(MessageHead):
    """One residual projection of the message per slot: the cheapest head; its slots are
    independent.
    """

    sequential = False

    def __init__(self, settings: HeadConfig, config: PretrainedConfig, num_taps: int):
        super().__init__(settings, config, num_taps)
        width, main_width = settings.hidden_size, config.hidden_size
        self.slot_proj = HeadLinear(width, settings.num_slots * width)
        self.norm = HeadRMSNorm(width, eps=1e-6)
        if settings.shared_embeddings:
            self.out_proj: nn.Module = HeadLinear(width, main_width)
        else:
            self.lm_head = HeadLinear(width, config.vocab_size)
            self.out_proj = nn.Identity()

    def forward(self, context: list[Tensor], embeds: Tensor | None) -> Tensor:
        message, *recalled = context
        slots = F.silu(self.slot_proj(message).unflatten(-1, (self.num_slots, -1)))
        if recalled:
            slots = slots + recalled[0]
        return self.out_proj(self.norm(message[:, None] + slots))


HEADS: dict[str, type[Head]] = {"eavesdrop": EavesdropHead, "parallel": ParallelHead}
"""Class of each `head.type`."""


def register_head(name: str, head_class: type[Head]) -> None:
    """Add a type of head. Raises ValueError for a name that another class has."""
    if HEADS.setdefault(name, head_class) is not head_class:
        raise ValueError(f"head.type {name!r} is {HEADS[name].__name__} already; choose a new name")
