"""A key-value cache indexed by position, so that the rows of a batch may grow at different rates.

Ships with checkpoints: imports torch and transformers only.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .versions import offset_of_keys


def in_autocast_dtype(x: Tensor) -> Tensor:
    """A tensor as autocast would cast it for a product, so that no pass has to cast it again."""
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


class BlockCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, stored at their position: [B, heads, capacity, width]."""

    def __init__(self, cache: "BlockCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        capacity = self.cache.capacity
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Rotated keys are wider than autocast's products; casting them here saves a cast per pass.
        key_states, value_states = in_autocast_dtype(key_states), in_autocast_dtype(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.keys.shape[2] < self.cache.capacity:
            more = self.cache.capacity - self.keys.shape[2]
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))
        span = self.cache.span
        if self.cache.is_even and not self.cache.is_static:
            length, new = self.cache.length, key_states.shape[2]
            self.keys[:, :, length - new : length] = key_states
            self.values[:, :, length - new : length] = value_states
        else:
            row = torch.arange(len(key_states), device=key_states.device)[:, None]
            self.keys[row, :, self.cache.positions] = key_states.transpose(1, 2)
            self.values[row, :, self.cache.positions] = value_states.transpose(1, 2)
        return self.keys[:, :, :span], self.values[:, :, :span]

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        return self.cache.span, offset_of_keys(self.cache.get_query_offset())

    def get_seq_length(self) -> int:
        return self.cache.length - self.cache.positions.shape[1]  # before this forward

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.14


class BlockCache(Cache):
    """A cache indexed by token position, so that rows may grow at different rates.

    Rows are padded on the right. A padded position is overwritten by the row's next block before
    any query can reach it, so a mask is the family's rule (causal, sliding, ...) on positions. To
    drop tokens is to move a row's start back.

    `most` are the positions that a text may take. A dynamic cache doubles when it is full, up to
    these, and attention reads what is written. A static one holds them all from the beginning and
    attention reads them all, most under the mask: more work, for one memory address and one shape
    throughout, as compiled forwards and CUDA graphs want.

    Main's layers are `layers`, the head's are `head_layers`. Main may write to more layers than the
    cache was made with, which are added then. For a main that reads the whole text at every pass,
    `text` holds the tokens and main's layers stay empty.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        most: int,
        is_static: bool = False,
        num_head_layers: int = 0,
    ):
        self.num_rows, self.most, self.is_static = num_rows, most, is_static
        self.capacity = most if is_static else 0
        self.length = 0
        self.positions = torch.empty(0, 0)
        self.is_even = False  # every row that counts ends where the cache does
        self.has_one_offset = False  # and transformers' own masks are right for them
        self.chosen: Tensor | None = None  # rows that are kept, if they have not been copied yet
        self.text: Tensor | None = None
        self.head_layers = [BlockCacheLayer(self) for _ in range(num_head_layers)]
        super().__init__(layers=[BlockCacheLayer(self) for _ in range(num_layers)])

    @property
    def span(self) -> int:
        """Positions that attention reads."""
        return self.capacity if self.is_static else self.length

    def place(self, positions: Tensor, length: int, is_even: bool) -> None:
        """Say where the next forward writes: positions [B, L], the last of them `length` - 1.

        is_even: every row that counts is written there, as a single row always is; what another row
        writes is never read. One token or the whole text of each of such rows needs no mask in a
        dynamic cache but the one that transformers makes for rows of one length, often none.
        """
        self.positions, self.length = positions, length
        self.is_even = is_even or len(positions) == 1
        is_plain = positions.shape[1] in (1, length) and not self.is_static
        self.has_one_offset = is_even and is_plain
        if self.chosen is not None:
            for layer in self.written:
                layer.keys, layer.values = layer.keys[self.chosen], layer.values[self.chosen]
            if self.text is not None:
                self.text = self.text[self.chosen]
            self.chosen = None
        if length > self.capacity:
            self.capacity = max(length, min(2 * self.capacity, self.most))

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Position of the first query, or of all queries [B, L] where rows differ."""
        return self.length - self.positions.shape[1] if self.has_one_offset else self.positions

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Write keys and values [B, heads, L, width] of a layer of main; returns its `span`."""
        while len(self.layers) <= layer_idx:
            self.layers.append(BlockCacheLayer(self))
        return self.layers[layer_idx].update(key_states, value_states)

    def whole_text(self, tokens: Tensor) -> Tensor:
        """Write the tokens [B, L] of a pass and return the texts [B, length] up to its end.

        Positions after a row's last token hold padding or tokens that were rejected.
        """
        if self.text is None:
            self.text = tokens.new_zeros(len(tokens), self.capacity)
        if self.text.shape[1] < self.capacity:
            more = self.capacity - self.text.shape[1]
            self.text = torch.nn.functional.pad(self.text, (0, more))
        self.text.scatter_(1, self.positions, tokens)
        return self.text[:, : self.length]

    def select(self, rows: Tensor) -> None:
        """Continue with the given rows, which may repeat.

        Rows are copied at the next `place`, so selecting twice copies once.
        """
        self.num_rows = len(rows)
        self.chosen = rows if self.chosen is None else self.chosen[rows]

    def part(self, rows: Tensor, start: Tensor, width: int) -> Tensor:
        """Keys and values of `width` positions from `start` [R] on, of the given rows [R].

        Returns [R, width, numbers], with all layers concatenated.
        """
        rows = rows if self.chosen is None else self.chosen[rows]
        where = start[:, None] + torch.arange(width, device=start.device)
        parts = [states[rows[:, None], :, where].flatten(2) for states in self.states]
        return torch.cat(parts, 2)

    @property
    def written(self) -> list[Any]:
        """Main's layers, then the head's, without those that nothing was written to."""
        return [layer for layer in (*self.layers, *self.head_layers) if layer.is_initialized]

    @property
    def states(self) -> list[Any]:
        """[B, heads, capacity, width] each layer's keys, then its values."""
        return [states for layer in self.written for states in (layer.keys, layer.values)]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(heads, width) of the keys and of the values of each layer; (0, 0) if there are none."""
        return [
            (states.shape[1], states.shape[3]) if layer.is_initialized else (0, 0)
            for layer in (*self.layers, *self.head_layers)
            for states in (layer.keys, layer.values)
        ]

    def load(self, parts: Tensor, shapes: list[tuple[int, int]]) -> None:
        """Write the result of `part` of a cache of these shapes from position 0 on: [R, T,
        numbers].
        """
        self.num_rows, self.capacity, self.chosen = len(parts), parts.shape[1], None
        sizes = [heads * width for heads, width in shapes]
        num_head_states = 2 * len(self.head_layers)
        while 2 * len(self.layers) < len(shapes) - num_head_states:
            self.layers.append(BlockCacheLayer(self))
        states = [
            part.unflatten(2, shape).transpose(1, 2).contiguous() if shape[0] else None
            for part, shape in zip(parts.split(sizes, 2), shapes, strict=True)
        ]
        layers = (*self.layers, *self.head_layers)
        for layer, keys, values in zip(layers, states[::2], states[1::2], strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, keys is not None
