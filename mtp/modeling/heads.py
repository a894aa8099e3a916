"""The head, which reads main's residual stream: its config, its types, and recall."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from .matrices import plain_matrix


@dataclass(kw_only=True)
class HeadConfig:
    """The eavesdropping head. Saved as `config.mtp` in a checkpoint's config.json."""

    type: str = "eavesdrop"
    """`eavesdrop`: a causal transformer over the slots of a block. `parallel`: one projection of
    the message per slot, all slots in one step, blind to the block's own tokens."""
    num_slots: int = field(default=5, metadata={"at_least": 1, "at_most": 1000})
    """K: head tokens per pass; a pass yields at most K + 1."""
    taps: list[int] | None = field(default=None, metadata={"at_least": 0})
    """Layers of main that the head hears, as indices into Hugging Face `hidden_states` (0: the
    embeddings, num_hidden_layers: after the final norm). None: a third, two thirds and the last."""
    hidden_size: int = field(default=96, metadata={"at_least": 1, "at_most": 1_000_000})
    """H, the head's width."""
    num_layers: int = field(default=1, metadata={"at_least": 1, "at_most": 10_000})
    num_attention_heads: int = field(default=4, metadata={"at_least": 1})
    intermediate_size: int = field(default=256, metadata={"at_least": 1, "at_most": 10_000_000})
    shared_embeddings: bool = True
    """Read and write tokens through main's embedding and output matrices. False: matrices of the
    head's own, [V, H], cheaper per slot where the vocabulary is large."""
    recall: bool = False
    """Hear main at all earlier positions too: slot j attends to what came j positions after those
    that resemble the anchor. Keeps keys and values of width H for each position of the text."""

    def resolved_taps(self, num_hidden_layers: int) -> list[int]:
        """The taps, checked against main's depth. Raises ValueError naming the key."""
        if self.taps is None:
            last = num_hidden_layers
            return sorted({max(1, round(last / 3)), max(1, round(2 * last / 3)), last})
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
        taps = self.taps
        if taps is None:
            return
        if not isinstance(taps, list) or any(type(tap) is not int for tap in taps):
            raise ValueError(f"head.taps must be null or a list of layers, got {taps!r}")
        if len(set(taps)) < len(taps):
            raise ValueError(f"head.taps must name each layer once, got {taps}")

    @classmethod
    def from_checkpoint(cls, saved: Any) -> "HeadConfig":
        """The settings in `config.mtp`; a field that an older checkpoint lacks has its default.

        Raises ValueError for fields that this version does not know, and as `validate` does.
        """
        if not isinstance(saved, dict):
            raise ValueError(f"mtp in config.json must be a head's settings by name, got {saved!r}")
        unknown = sorted(set(saved) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"mtp in config.json holds settings that this version does not know "
                f"({', '.join(unknown)}); open the checkpoint with the version that wrote it"
            )
        settings = cls(**saved)
        settings.validate()
        return settings


class HeadLinear(nn.Linear):
    """A bias-free matrix of the head, told apart from main's for its initialization."""

    def __init__(self, num_in: int, num_out: int):
        super().__init__(num_in, num_out, bias=False)


class HeadRMSNorm(nn.RMSNorm):
    """In the weight's dtype: under autocast rows may be narrower, which torch warns of."""

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
    """The vector that the head makes of the taps: [N, taps, D] -> [N, H].

    Each tap is divided by its own root mean square first: the residual stream grows with depth.
    """

    def __init__(self, num_taps: int, main_width: int, width: int):
        super().__init__()
        self.proj = HeadLinear(num_taps * main_width, width)
        self.main_width = main_width

    def forward(self, taps: Tensor) -> Tensor:
        return self.proj(F.rms_norm(taps, (self.main_width,), eps=1e-6).flatten(-2))


class Recall(nn.Module):
    """Attention over main's messages at all positions up to the anchor, one value for each slot.

    Slot j at anchor t weighs position s <= t - j by how much it resembles t, and reads the message
    of s + j: what main was about to say j tokens after it last stood where it stands now. So all
    slots can continue a copy at once, which neither the anchor's message alone nor attention
    without that shift can tell them. Weights sum to less than 1: slot j has j keys of zeros, whose
    value is zero, so that it can recall nothing.
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
        """Each position of a text as an anchor: [B, T, H] -> [B, T, K, H]."""
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
        """The same at one anchor of each row: message [B, H] at position [B] -> [B, K, H].

        keys and values [B, heads, S, d] of the positions from 0 on; those behind the anchor are
        not read.
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


class EavesdropHead(nn.Module):
    """A causal transformer over the slots of one block. Slot j reads t_{j-1} and the message.

    Without `recall` it keeps nothing across passes: what was said before, main has already read.
    """

    sequential = True
    """Slot j reads the token of slot j - 1, so decoding takes one step per slot."""

    def __init__(self, settings: HeadConfig, config: PretrainedConfig, num_taps: int):
        super().__init__()
        width, main_width = settings.hidden_size, config.hidden_size
        self.message = Message(num_taps, main_width, width)
        self.recall = Recall(settings) if settings.recall else None
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

    def forward(self, message: Tensor, embeds: Tensor, recalled: Tensor | None) -> Tensor:
        """All slots at once: message [N, H], embeddings of t_0..t_{K-1} [N, K, .] and what was
        recalled [N, K, H] -> [N, K, E].
        """
        return self.step(message, embeds, recalled, 0, None)[0]

    def step(
        self, message: Tensor, embeds: Tensor, recalled: Tensor | None, slot: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Slots from `slot` (0: the head's first) on, given the state of the earlier ones.

        embeds [N, J, D or H] of the preceding tokens -> hidden rows [N, J, E] and the new state.
        """
        these = slice(slot, slot + embeds.shape[1])
        embeds = F.rms_norm(embeds, embeds.shape[-1:], eps=1e-6)
        slots = plain_matrix(self.slot_embed, "mtp_head.slot_embed")
        x = self.in_proj(embeds) + message[:, None] + slots[these]
        if recalled is not None:
            x = x + recalled[:, these]
        new_state = []
        for index, layer in enumerate(self.layers):
            x, kept = layer(x, state[index] if state else None)
            new_state.append(kept)
        return self.out_proj(self.norm(x)), new_state


class ParallelHead(nn.Module):
    """One residual projection of the message per slot: the cheapest head, with incoherent slots."""

    sequential = False

    def __init__(self, settings: HeadConfig, config: PretrainedConfig, num_taps: int):
        super().__init__()
        width, main_width = settings.hidden_size, config.hidden_size
        self.num_slots = settings.num_slots
        self.message = Message(num_taps, main_width, width)
        self.recall = Recall(settings) if settings.recall else None
        self.slot_proj = HeadLinear(width, settings.num_slots * width)
        self.norm = HeadRMSNorm(width, eps=1e-6)
        if settings.shared_embeddings:
            self.out_proj: nn.Module = HeadLinear(width, main_width)
        else:
            self.lm_head = HeadLinear(width, config.vocab_size)
            self.out_proj = nn.Identity()

    def forward(self, message: Tensor, embeds: Tensor | None, recalled: Tensor | None) -> Tensor:
        """All slots at once: message [N, H], recalled [N, K, H] -> [N, K, E]. The block's tokens
        are not read.
        """
        slots = F.silu(self.slot_proj(message).unflatten(-1, (self.num_slots, -1)))
        if recalled is not None:
            slots = slots + recalled
        return self.out_proj(self.norm(message[:, None] + slots))


HEADS: dict[str, type[nn.Module]] = {"eavesdrop": EavesdropHead, "parallel": ParallelHead}
