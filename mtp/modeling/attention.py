"""Attention of a pass: a few queries of each row over its cached keys.

Where several query heads share a key head, transformers' SDPA copies the cache for each query head
if it is given a mask and more than one query. Here the queries of such heads are concatenated
instead: the products are the same, and the cache is read as it is.

A model whose attention is `sdpa` uses `attend`, registered with transformers as `sdpa_of_blocks`:
it is transformers' own function unless a pass sets `in_pass`. The choice is an argument of each
forward and changes no setting, so passes, `generate` and training may run side by side in threads.

Masks are transformers' own too: each family gives the mask function of each type of its layers
(causal, sliding, chunked). A pass evaluates it at each row's own positions.

Ships with checkpoints: imports torch and transformers only.

Shapes: B rows, H query heads, G key heads, L queries, S keys, d width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    eager_mask,
    padding_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

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
    shared_mask = attention_mask is not None and attention_mask.shape[1] == 1
    biased = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    if not in_pass or not shared_mask or biased or num in (1, key.shape[2]):
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


MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Says where a query may attend to a key, from indices of row, head, query and key that are
broadcast."""


def mask_of_rows(
    positions: Tensor, num_keys: int, mask_function: MaskFunction, padding: Tensor | None
) -> Tensor:
    """The mask [B, 1, L, S], True where a query may attend to a key, of queries at `positions`.

    positions [B, L]: each row's own. mask_function: the family's, such as a sliding window. padding
    [B, at most S]: 0 at keys that are hidden from all queries.
    """
    rows, num = positions.shape
    padding = prepare_padding_mask(padding, num_keys, 0)
    if padding is not None:
        mask_function = and_masks(mask_function, padding_mask_function(padding))
    row = torch.arange(rows, device=positions.device)[:, None, None, None]
    keys = torch.arange(num_keys, device=positions.device)[None, None, None]
    mask = mask_function(row, torch.zeros_like(keys[..., :1]), positions[:, None, :, None], keys)
    return mask.expand(rows, 1, num, num_keys)


def _allowed(given: dict[str, Any]) -> Tensor | None:
    """The mask of a pass, from the arguments of a mask function; None outside a pass."""
    positions = given.get("q_offset")
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        return None
    return mask_of_rows(
        positions, given["kv_length"], given["mask_function"], given.get("attention_mask")
    )


def sdpa_mask_of_pass(*args: Any, **given: Any) -> Tensor | None:
    """transformers' `sdpa_mask`; `q_offset` may also be the positions [B, L] of queries."""
    allowed = _allowed(given)
    return sdpa_mask(*args, **given) if allowed is None else allowed


def eager_mask_of_pass(*args: Any, **given: Any) -> Tensor:
    """transformers' `eager_mask`, which is added to scores; `q_offset` as above."""
    allowed = _allowed(given)
    if allowed is None:
        return eager_mask(*args, **given)
    dtype = given.get("dtype", torch.float32)
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
    return torch.where(allowed, hidden.new_zeros(()), hidden)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask_of_pass)
# Families whose attention is eager, as softcaps and sinks need, or that have attention classes of
# their own, find their masks under these names. Without a pass, the masks are transformers' own.
AttentionMaskInterface.register("sdpa", sdpa_mask_of_pass)
AttentionMaskInterface.register("eager", eager_mask_of_pass)


def check_attention(config: PretrainedConfig) -> None:
    """Raises ValueError for an implementation that cannot read a pass's cache under its mask."""
    found = config._attn_implementation
    if found not in (NAME, "sdpa", "eager"):
        raise ValueError(
            f"attn_implementation must be sdpa or eager to decode with mtp, got {found!r}; call "
            "model.set_attn_implementation('sdpa')"
        )
