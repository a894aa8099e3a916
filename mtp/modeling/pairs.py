"""A head whose layer reads pairs: main's features at a position and the token after it.

The pair of position p holds the token at p and the features of p - 1; position 0 has none. The
layer attends to the pairs of all earlier positions:

    slot 1     features of main at the anchor a, and t_0
    slot j     the layer's own output in slot j - 1 in place of main's features, and t_{j-1}

Main's cache has two more layers: keys and values of pairs, and features, of which a later pass
reads the last. Pairs of accepted tokens are kept there. What the head computed for its own slots is
forgotten after the pass, and a rejected draft is overwritten by the next one.

Training unrolls the same slots, so the head learns from its own features too.

Ships with checkpoints: imports torch and siblings only.

Shapes: R rows of a pass, L tokens read, B texts, T time, N anchors, G cells (anchors, padded to the
same number for each text), J slots, F width of the features, S positions of a text that are kept.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .heads import Embed, Head, Remember


class PairHead(Head):
    """Memory and contexts of such a head.

    A context is features [G, F] and positions [G] of the anchors, then keys and values [B, heads,
    S, d] of the texts, in decoding one text for each anchor. In replay, two tensors of `cells_of`
    follow, and `step` is given the first four with anchors in cells.
    """

    num_cache_layers = 2

    @abstractmethod
    def features(self, taps: Sequence[Tensor]) -> Tensor:
        """Features of positions: taps [., ., D] each -> [., ., F], F even."""

    @abstractmethod
    def keys_and_values(
        self, features: Tensor, embeds: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[., heads, J, d] of pairs: features and embeddings [., J, .], position of the token
        [., J].
        """

    def observe(
        self, taps: list[Tensor], tokens: Tensor, start: Tensor, embed: Embed, remember: Remember
    ) -> list[Tensor]:
        features = self.features(taps)
        # The pair of a token holds the features before it, for the first token those of an earlier
        # pass. A layer of the cache keeps features in two halves, as its keys and its values.
        halves = remember(1, *(half[:, None] for half in features.chunk(2, -1)))
        row = torch.arange(len(tokens), device=tokens.device)[:, None]
        position = start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        before = (position - 1).clamp(min=0)
        previous = torch.cat([half[row, 0, before] for half in halves], -1)
        keys, values = self.keys_and_values(previous, embed(tokens), position)
        return [features, *remember(0, keys, values)]

    def context(self, observed: list[Tensor], at: Tensor, position: Tensor) -> list[Tensor]:
        features, keys, values = observed
        row = torch.arange(len(at), device=at.device)
        return [features[row, at], position, keys, values]

    def replay_context(
        self, taps: Tensor, tokens: Tensor, anchors: Tensor, embed: Embed
    ) -> list[Tensor]:
        num_texts, length = tokens.shape
        features = self.features(taps.unbind(2))
        previous = F.pad(features, (0, 0, 1, 0))[:, :length]
        position = torch.arange(length, device=tokens.device)[None]
        keys, values = self.keys_and_values(previous, embed(tokens), position)
        flat = features.flatten(0, 1)
        cells = cells_of(anchors // length, num_texts)
        return [flat[anchors], anchors % length, keys, values, *cells]

    def swapped(self, context: list[Tensor]) -> list[Tensor]:
        """Features of another anchor; what the head keeps of earlier positions stays."""
        features, *rest = context
        return [*super().swapped([features]), *rest]

    def forward(self, context: list[Tensor], embeds: Tensor | None) -> Tensor:
        assert embeds is not None
        features, position, keys, values, *cells = context
        if not cells:
            return self.step(context, embeds, 0, None)[0]
        anchor, cell = cells
        padded = [features[anchor], position[anchor], keys, values]
        return self.step(padded, embeds[anchor], 0, None)[0][cell]


def cells_of(text: Tensor, num_texts: int) -> tuple[Tensor, Tensor]:
    """Pad anchors to the same number for each text: text [N] of each anchor.

    Returns the anchor of each cell [G] (0 for an empty one, whose result nobody reads) and the cell
    of each anchor [N].
    """
    count = text.bincount(minlength=num_texts)
    order = text.argsort(stable=True)
    nth = torch.arange(len(text), device=text.device) - (count.cumsum(0) - count)[text[order]]
    most = int(count.max())
    cell = torch.empty_like(text)
    cell[order] = text[order] * most + nth
    anchor = torch.zeros(num_texts * most, dtype=text.dtype, device=text.device)
    anchor[cell] = torch.arange(len(text), device=text.device)
    return anchor, cell
