"""Targets of k output positions per pass: the one place where a shift is turned into an index.

With hidden states [B, T, K, D] and tokens [B, T], slot j at position t predicts the token at
`t + shift + j`. With shift = 1 and K = 1 this is ordinary next-token prediction.

    tokens = [[5, 6, 7, 8]], K = 2, shift = 1
    target = [[[6, 7], [7, 8], [8, -], [-, -]]]      where - is ignore_index
"""

import torch
from torch import Tensor

from mtp_kernels.checks import check_document_and_mask, check_integers


def shifted_positions(length: int, num_slots: int, shift: int, device: torch.device) -> Tensor:
    """[T, K] int64: the position that slot j at t predicts, unclipped."""
    step = torch.arange(length, device=device)[:, None]
    return step + shift + torch.arange(num_slots, device=device)


def shifted_targets(
    tokens: Tensor,
    num_slots: int,
    *,
    shift: int = 1,
    document: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """[B, T, K] int64 targets made of tokens [B, T].

    Args:
        tokens: [B, T] integer token ids; a token equal to ignore_index is never a target.
        num_slots: K, the number of output positions per pass.
        shift: distance in tokens from a position to the target of its slot 0; at least 0.
        document: [B, T] integer document ids of packed sequences. A target in another document
            than its position is ignored.
        mask: [B, T] bool, True where a token may be a target.
        ignore_index: the value written where a row has no target.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [B, T], got shape {tuple(tokens.shape)}")
    check_integers(tokens=tokens)
    check_document_and_mask(document, mask, (tokens.shape[0], tokens.shape[1]))
    if shift < 0:
        raise ValueError(f"shift must be >= 0, got {shift}")
    length = tokens.shape[1]
    position = shifted_positions(length, num_slots, shift, tokens.device)  # [T, K]
    inside = position < length
    index = position.clamp_max(max(length - 1, 0))
    valid = inside.expand(tokens.shape[0], -1, -1)
    if document is not None:
        valid = valid & (document[:, index] == document[:, :, None])
    if mask is not None:
        valid = valid & mask[:, index]
    return torch.where(valid, tokens[:, index].long(), ignore_index)


def resolve_targets(
    hidden: Tensor,
    target: Tensor | None,
    tokens: Tensor | None,
    *,
    shift: int,
    document: Tensor | None,
    mask: Tensor | None,
    ignore_index: int | None,
) -> Tensor:
    """The explicit target, or the one made of tokens; int64 in hidden's leading shape.

    Raises:
        ValueError: unless exactly one of target and tokens is given, in a fitting shape, and
            ignore_index with tokens.
    """
    if (target is None) == (tokens is None):
        raise ValueError("give exactly one of target and tokens")
    if target is not None:
        if document is not None or mask is not None:
            raise ValueError(
                "document and mask go with tokens; put ignore_index into target instead"
            )
        if target.shape != hidden.shape[:-1]:
            raise ValueError(
                f"target must have hidden's leading shape {tuple(hidden.shape[:-1])}, "
                f"got {tuple(target.shape)}"
            )
        check_integers(target=target)
        return target.long()
    assert tokens is not None
    if ignore_index is None:
        raise ValueError("tokens leave rows without a target: give ignore_index a number, not None")
    if hidden.ndim != 4 or tokens.shape != hidden.shape[:2]:
        raise ValueError(
            "with tokens [B, T], hidden must be [B, T, K, D]; "
            f"got tokens {tuple(tokens.shape)} and hidden {tuple(hidden.shape)}"
        )
    return shifted_targets(
        tokens,
        hidden.shape[2],
        shift=shift,
        document=document,
        mask=mask,
        ignore_index=ignore_index,
    )
