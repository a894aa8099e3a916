"""Attention of a pass: a few queries of each row over its cached keys.

Where several query heads share a key head, transformers' SDPA copies the cache for each query head
if it is given a mask and more than one query. Here the queries of such heads are concatenated
instead: the products are the same, and the cache is read as it is.

A model whose attention is `sdpa` uses `attend`, registered with transformers as `sdpa_of_blocks`:
it is transformers' own function unless a pass sets `in_pass`. The choice is an argument of each
forward and changes no setting, so passes, `generate` and training may run side by side in threads.

Ships with checkpoints: imports torch and transformers only.

Shapes: B rows, H query heads, G key heads, L queries, S keys, d width of a head.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_of_blocks"
"""Name of the implementation among those of transformers."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    in_pass: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query [B, H, L, d], key and value [B, G, S, d], mask [B, 1, L, S] or None -> [B, L, H, d].

    in_pass: the caller is a pass of the pass loop.
    """
    rows, heads, num, width = query.shape
    if not in_pass or attention_mask is None or num in (1, key.shape[2]):
        # One token, or a prompt with nothing cached: identical to transformers, to the last bit.
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    shared = heads // key.shape[1]
    query = query.reshape(rows, heads // shared, shared * num, width)
    attention_mask = attention_mask.repeat(1, 1, shared, 1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(rows, heads, num, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def check_attention(config: PretrainedConfig) -> None:
    """Raises ValueError for an implementation that cannot read a pass's cache under its mask."""
    found = config._attn_implementation
    if found not in (NAME, "sdpa", "eager"):
        raise ValueError(
            f"attn_implementation must be sdpa or eager to decode with mtp, got {found!r}; call "
            "model.set_attn_implementation('sdpa')"
        )
