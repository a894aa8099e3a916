"""The MTP layer of main's own family (DeepSeek-V3, arXiv 2412.19437), as transformers decodes it.

    x = eh_proj[enorm(embedding of the token), hnorm(hidden state before it)]
    row = post_norm(decoder layer of the family(x)),    logits by main's output matrix

The hidden state is main's after its final norm. The layer attends to the pairs of all earlier
positions (`pairs.py`). Its classes are those of `transformers.modeling_layers.MtpLayer`, so
`generate(use_mtp=True)` computes the same numbers from an export in `--format native_mtp`.

The paper has one layer for each slot. Here one layer writes all slots: slot j reads the row of slot
j - 1 in place of main's hidden state. transformers drafts one token a pass with one layer, which is
slot 1.

Left out: families whose config has no field `num_mtp_layers`, and layers other than attention to
keys and values by position.

Ships with checkpoints: imports torch, transformers and siblings only.

Shapes: B texts, G cells (anchors, padded to the same number M for each text), J slots, S positions
of a text that are kept, D main width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, PretrainedConfig

from .attention import STOCK
from .heads import HeadConfig
from .pairs import PairHead
from .versions import MtpLayer

NUM_LAYERS = "num_mtp_layers"
"""Field of a config with the number of MTP layers, under this or another name."""
MAIN_FIRST = "mtp_hidden_states_first"
CHAIN_NORM = "chain_hidden_post_norm"
"""Fields of configs whose MTP layers compute something else."""
ATTENTION = ("full_attention", "sliding_attention")


def with_mtp_layer(config: PretrainedConfig) -> Any:
    """Main's config with one MTP layer.

    Raises ValueError for a transformers without MTP layers, and for a family whose MTP layers
    transformers does not decode, or not as here.
    """
    if MtpLayer is None:
        raise ValueError(
            "head.type=native_mtp must be given transformers 5.14 or newer, which have MTP layers, "
            f"got {transformers.__version__}; update it or use head.type=eagle3"
        )
    what = f"head.type=native_mtp must be given a main of a family with {NUM_LAYERS} in its config"
    name = config.attribute_map.get(NUM_LAYERS, NUM_LAYERS)
    fields = config.to_dict()
    if name not in fields:
        raise ValueError(
            f"{what}, such as deepseek_v3, glm4_moe or mellum, got {config.model_type}, whose MTP "
            "layers transformers does not decode; use head.type=eagle3"
        )
    found = type(config).from_dict({**fields, name: 1})
    types = getattr(found, "mtp_layer_types", None) or ATTENTION[:1]
    is_other = getattr(found, MAIN_FIRST, False) or hasattr(found, CHAIN_NORM)
    # The layers of a recurrent family are not all attention.
    is_other |= not set(getattr(found, "layer_types", None) or types) <= set(ATTENTION)
    if is_other or types[0] not in ATTENTION:
        raise ValueError(
            f"{what} and MTP layers that attend to keys and values by position, got "
            f"{config.model_type}, whose layers do more; use head.type=eagle3"
        )
    return found


class Memory:
    """The cache that the layer's attention is given: keys and values of texts and of own slots."""

    def __init__(self, earlier: Sequence[tuple[Tensor, Tensor]] = (), most: int | None = None):
        """earlier: keys and values before the new ones; most: number of positions to return."""
        self.earlier, self.most = earlier, most
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep the new keys and values; returns all of them, up to `most`."""
        self.new = keys, values
        parts = zip(*self.earlier, self.new, strict=True)
        return tuple(torch.cat(part, 2)[:, :, : self.most] for part in parts)


class NativeMTPHead(PairHead):
    """One MTP layer of main's family, for all slots."""

    def __init__(self, settings: HeadConfig, config: PretrainedConfig, num_taps: int):
        super().__init__(settings, config, num_taps)
        last, width = config.num_hidden_layers, config.hidden_size
        if settings.hidden_size != width:
            raise ValueError(
                f"head.hidden_size must be main's width {width} for head.type=native_mtp, got "
                f"{settings.hidden_size}; set it to {width}"
            )
        if settings.resolved_taps(last) != [last]:
            raise ValueError(
                f"head.taps must be [{last}], main's last, for head.type=native_mtp, got "
                f"{settings.taps}; leave it null"
            )
        main = with_mtp_layer(config)
        found = main.get_mtp_config()
        implementation = config._attn_implementation or "sdpa"
        found._attn_implementation = STOCK.get(implementation, implementation)
        with torch.device("meta"):
            layers = AutoModel.from_config(found)
        block, rotary = layers.layers[-1], layers.rotary_emb
        norm = next(type(module) for name, module in block.named_modules() if "norm" in name)
        self.layer = MtpLayer(found, type(block), norm, 0)
        self.rotary_emb = type(rotary)(config=found)
        kind = (getattr(found, "layer_types", None) or ATTENTION[:1])[0]
        self.window = found.sliding_window if kind == "sliding_attention" else None
        per_type = found.nested_rope_parameter_keys(found.rope_parameters)
        self.rope_options = {"layer_type": kind} if per_type else {}

    @classmethod
    def check_settings(cls, settings: HeadConfig) -> None:
        wanted = {"num_layers": 1, "shared_embeddings": True, "recall": False}
        for key, value in wanted.items():
            if getattr(settings, key) != value:
                shown = str(value).lower()
                raise ValueError(
                    f"head.{key} must be {shown} for head.type=native_mtp, a layer of main's "
                    f"family, got {getattr(settings, key)}; set it to {shown}"
                )

    @staticmethod
    def default_taps(num_hidden_layers: int) -> list[int]:
        """Main's hidden state after its final norm."""
        return [num_hidden_layers]

    def features(self, taps: Sequence[Tensor]) -> Tensor:
        return taps[0]

    def rotation(self, x: Tensor, position: Tensor) -> Any:
        """Cosines and sines of the positions [., J] of tokens."""
        return self.rotary_emb(x, position_ids=position, **self.rope_options)

    def keys_and_values(
        self, features: Tensor, embeds: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layer
        memory = Memory(most=1)
        x = layer.eh_proj(torch.cat([layer.enorm(embeds), layer.hnorm(features)], -1))
        # The attention's result is not needed: it is given one key.
        layer.mtp_block.self_attn(
            hidden_states=layer.mtp_block.input_layernorm(x),
            position_embeddings=self.rotation(x, position),
            attention_mask=self.mask(position.new_ones(1, 1, x.shape[1], 1, dtype=torch.bool), x),
            past_key_values=memory,
        )
        assert memory.new is not None
        return memory.new

    def mask(self, is_read: Tensor, x: Tensor) -> Tensor:
        """A mask [B, 1, J, S], True where a position is read, as the attention takes it."""
        if self.layer.config._attn_implementation != "eager":
            return is_read
        lowest = torch.finfo(x.dtype).min
        return torch.zeros_like(is_read, dtype=x.dtype).masked_fill(~is_read, lowest)

    def step(
        self, context: list[Tensor], embeds: Tensor, slot: int, state: Any
    ) -> tuple[Tensor, Any]:
        # Recomputed in backward, the layer would not get its keys and values.
        block: Any = self.layer.mtp_block
        block.gradient_checkpointing = False
        features, anchor, keys, values = context
        features, *own = [features] if state is None else state
        num_texts, length = len(keys), keys.shape[2]
        by_text = (num_texts, -1)
        anchor = anchor.view(by_text)  # [B, M]
        entry = torch.arange(length, device=keys.device)
        # Entry 0 of a text holds no pair.
        of_text = (entry > 0) & (entry <= anchor[:, :, None])  # [B, M, S]
        is_own = torch.eye(anchor.shape[1], dtype=torch.bool, device=keys.device)
        rows = []
        for number, embed in enumerate(embeds.unbind(1), slot):
            position = anchor + number + 1
            reads = [of_text, *[is_own.expand(num_texts, -1, -1)] * (number + 1)]
            if self.window is not None:
                # Own slots are as far back as slots are, and texts as positions are.
                reads[0] = of_text & (position[:, :, None] - entry < self.window)
                reads[1:] = [
                    part & (number - before < self.window) for before, part in enumerate(reads[1:])
                ]
            earlier = [(keys, values), *([(own[0], own[1])] if own else [])]
            memory = Memory(earlier)
            x = features.view(*by_text, features.shape[-1])
            x = self.layer(
                embed.reshape(x.shape),
                x,
                position_embeddings=self.rotation(x, position),
                attention_mask=self.mask(torch.cat(reads, -1)[:, None], x),
                position_ids=position,
                past_key_values=memory,
            )
            assert memory.new is not None
            own = [torch.cat(parts, 2) for parts in zip(*earlier[1:], memory.new, strict=True)]
            features = x.reshape(-1, x.shape[-1])
            rows.append(features)
        return torch.stack(rows, 1), [features, *own]
