"""Attention of a pass: a few queries of each row over its cached keys, and the masks for it.

Rows of one batch grow at different rates, so each row's queries have positions of their own.
transformers builds the mask of each type of layer through a registry of mask functions, and gives
the registered function the family's own rule (causal, sliding, chunked, combinations). The masks
here evaluate that rule at the rows' own positions, which come from the cache (`BlockCache`).

Where several query heads share a key head, transformers' SDPA copies the cache for each query head
if it is given a mask and more than one query. Here the queries of such heads are concatenated
instead: the products are the same, and the cache is read as it is.

A model that attends by `sdpa` or `eager` does so by `attend` or `attend_eagerly`, registered with
transformers as `sdpa_of_blocks` and `eager_of_blocks`. Both are transformers' own functions, except
where a pass asks for the above. The choice is an argument of each forward and no setting is changed
for it, so passes, `generate` and training may run side by side in threads.

Ships with checkpoints: imports torch and transformers only.

Shapes: B rows, H query heads, G key heads, L queries, S keys, d width of a head.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from .versions import positions_of_queries

NAME, EAGER = "sdpa_of_blocks", "eager_of_blocks"
"""The names of the two implementations in transformers' registries."""
STOCK = {NAME: "sdpa", EAGER: "eager"}
"""The implementation of transformers that each is, outside a pass."""


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
    is_plain = kwargs.get("position_bias") is None and kwargs.get("softcap") is None
    has_one_mask = attention_mask is not None and attention_mask.shape[1] == 1
    if not (in_pass and has_one_mask and is_plain) or num in (1, key.shape[2]):
        # One token, or a prompt with nothing cached: identical to transformers, to the last bit.
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert attention_mask is not None
    shared = heads // key.shape[1]
    query = query.reshape(rows, heads // shared, shared * num, width)
    attention_mask = attention_mask.repeat(1, 1, shared, 1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(rows, heads, num, -1).transpose(1, 2).contiguous(), None


def attend_eagerly(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The function that the module's own family attends by where the implementation is `eager`."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def mask_of_pass(
    *,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    **kwargs: Any,
) -> Tensor | None:
    """The mask [B or 1, 1, L, S], True where a query may look; None where SDPA needs none.

    A call from outside a pass, or of rows that end together, gets transformers' own mask; else
    `BlockCache` has given the positions of the queries.
    """
    positions = positions_of_queries(**kwargs)
    if positions is None:
        return sdpa_mask(kv_length=kv_length, mask_function=mask_function, **kwargs)
    queries = positions[:, None, :, None]
    keys = torch.arange(kv_length, device=positions.device)
    if mask_function is causal_mask_function:
        return keys <= queries
    rows = torch.arange(len(positions), device=positions.device)[:, None, None, None]
    mask = mask_function(rows, torch.zeros_like(rows), queries, keys[None, None, None])
    return mask.expand(-1, -1, positions.shape[1], kv_length)


def eager_mask_of_pass(*, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """The same mask as numbers: 0 where a query may look, else the lowest of the dtype."""
    if positions_of_queries(**kwargs) is None:
        mask: Tensor = eager_mask(dtype=dtype, **kwargs)
        return mask
    allowed = mask_of_pass(**kwargs)
    assert allowed is not None
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )


AttentionInterface.register(NAME, attend)
AttentionInterface.register(EAGER, attend_eagerly)
AttentionMaskInterface.register(NAME, mask_of_pass)
AttentionMaskInterface.register(EAGER, eager_mask_of_pass)


def of_blocks(found: str, family: type) -> str:
    """The implementation that knows a pass, of the one that transformers chose for a family.

    A family whose code does not ask transformers' registry for its attention has its own, which is
    `eager` in all but name.
    """
    has_choice = hasattr(sys.modules[family.__module__], "ALL_ATTENTION_FUNCTIONS")
    if found == "sdpa":
        return NAME if has_choice else EAGER
    return EAGER if found == "eager" else found


def check_attention(model: Any) -> None:
    """Raises ValueError for an implementation that cannot read a pass's cache under its mask."""
    found = model.config._attn_implementation
    if found not in STOCK and not model.reads_whole_text:
        raise ValueError(
            f"attn_implementation must be sdpa or eager to decode with mtp, got {found!r}; call "
            "model.set_attn_implementation('sdpa')"
        )
