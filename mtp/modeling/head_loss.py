"""`forward(labels=...)` that trains the head beside main, for trainers that know nothing of it.

`config.mtp_loss_weight` (0: off, which is the default and the stock forward) is the weight of the
head's loss: the mean cross entropy of the tokens that its slots write at the anchors of the text.
In training a random share 1/K of the anchors is scored, as many rows as main has; in evaluation
all.

Ships with checkpoints: imports torch, transformers and siblings only.

Shapes: B batch, T time, N anchors, K head slots, D main width, V vocabulary.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NO_LABEL = -100


def with_head_loss(stock: Any) -> Any:
    """The stock `forward` of a causal LM, whose loss has the head's added where that is wanted."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        weight = getattr(self.config, "mtp_loss_weight", None) or 0.0
        given = signature.bind_partial(self, *args, **kwargs).arguments if weight else {}
        labels = given.get("labels")
        if labels is None:
            return stock(self, *args, **kwargs)
        more = {**given, **given.get("kwargs", {})}
        if more.get("input_ids") is None:
            raise ValueError(
                "config.mtp_loss_weight needs input_ids, which the head's slots read; give them, "
                "or set it to 0"
            )
        out = stock(self, *args, **kwargs | {"output_hidden_states": True, "return_dict": True})
        states = [out.hidden_states[tap] for tap in self.mtp_taps]
        loss = head_loss(
            self, torch.stack(states, -2), more["input_ids"], labels, more.get("attention_mask")
        )
        total = more.get("num_items_in_batch")
        if total is not None:  # the stock loss is then a sum divided by this number
            loss = loss * (labels[:, 1:] != NO_LABEL).sum() / total
        out.loss = out.loss + weight * loss
        if not more.get("output_hidden_states"):
            out = type(out)(**{k: v for k, v in out.items() if k != "hidden_states"})
        return out.to_tuple() if more.get("return_dict") is False else out

    return forward


def head_loss(
    model: Any, taps: Tensor, input_ids: Tensor, labels: Tensor, mask: Tensor | None
) -> Tensor:
    """Mean cross entropy of the head's tokens, without those that it cannot write (`eagle3.py`).

    Args:
        model: an `MTPMixin` model.
        taps: [B, T, taps, D] main's hidden rows.
        input_ids: [B, T] the text.
        labels: [B, T] the tokens to learn, -100 elsewhere.
        mask: [B, T] 0 at padding, or None.

    Raises ValueError for padding on the left under a head that remembers past positions.
    """
    is_text = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if is_text.ndim != 2:
        raise ValueError(
            f"config.mtp_loss_weight needs an attention_mask [B, T], got {list(is_text.shape)}; "
            "give one of two dimensions, or set it to 0"
        )
    if model.mtp_head.num_cache_layers and not bool(is_text[:, 0].all()):
        raise ValueError(
            "config.mtp_loss_weight needs texts padded on the right, since this head reads all "
            "positions of a text; set padding_side='right'"
        )
    num_slots, length = model.block_size - 1, input_ids.shape[1]
    offset = torch.arange(1, num_slots + 2, device=input_ids.device)
    at = torch.arange(length, device=input_ids.device)[:, None] + offset  # [T, K + 1]
    inside, at = at < length, at.clamp(max=length - 1)
    tokens = input_ids[:, at]  # [B, T, K + 1]: t_0..t_K of the block behind each position
    targets = torch.where(inside, labels[:, at], NO_LABEL)[..., 1:]
    output = model.output_layers()[1]
    targets = torch.where(output.has_row(targets), targets, NO_LABEL)
    anchors = ((targets != NO_LABEL).any(-1) & is_text).flatten().nonzero()[:, 0]
    if model.training:
        number = -(-len(anchors) // num_slots)
        order = torch.randperm(len(anchors), device=anchors.device)[:number]
        anchors = anchors[order.sort().values]
    if not len(anchors):
        return taps.sum() * 0.0
    context = model.head_context(taps, input_ids, anchors)
    rows = model.mtp_head(context, model.head_embed(tokens.flatten(0, 1)[anchors, :-1]))
    wanted = targets.flatten(0, 1)[anchors]
    logits = output.row_logits(rows).float()
    return F.cross_entropy(
        logits.flatten(0, 1),
        torch.where(wanted == NO_LABEL, NO_LABEL, output.rows_of(wanted)).flatten(),
        ignore_index=NO_LABEL,
    )


class MTPHeadLossMixin:
    """Gives a causal LM class the `forward` of `with_head_loss`, with the stock signature."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = getattr(cls, "forward", None)
        if stock is not None and not hasattr(stock, "adds_head_loss"):
            forward = with_head_loss(stock)
            forward.adds_head_loss = True
            cls.forward = forward  # type: ignore[attr-defined]
