"""A key-value cache indexed by position, so that the rows of a batch may grow at different rates.

Ships with checkpoints: imports torch and transformers only.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


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
        rows, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, self.cache.capacity, width)
        self.values = value_states.new_zeros(rows, heads, self.cache.capacity, width)
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

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.span, 0

    def get_seq_length(self) -> int:
        return self.cache.length - self.cache.positions.shape[1]  # before this forward

    def get_max_length(self) -> int:
        return -1


class BlockCache(Cache):
    """A cache indexed by token position, so that rows may grow at different rates.

    Rows are padded on the right. A row's next block overwrites its padded positions before any
    query can reach them, so the mask is simply: key position <= query position. Tokens are dropped
    by moving a row's start back.

    `most` is the number of positions that a text may take. A dynamic cache doubles when it is full,
    up to this number, and attention reads the written part. A static cache holds all positions from
    the beginning and attention reads all of them, most of them masked. This is more work, but
    memory address and shape never change, as compiled forwards and CUDA graphs need.
    """

    def __init__(self, num_layers: int, num_rows: int, most: int, is_static: bool = False):
        self.num_rows, self.most, self.is_static = num_rows, most, is_static
        self.capacity = most if is_static else 0
        self.length = 0
        self.positions = torch.empty(0, 0)
        self.is_even = False  # every active row ends at the end of the cache
        self.chosen: Tensor | None = None  # selected rows, if they have not been copied yet
        super().__init__(layers=[BlockCacheLayer(self) for _ in range(num_layers)])

    @property
    def span(self) -> int:
        """Positions that attention reads."""
        return self.capacity if self.is_static else self.length

    def place(self, positions: Tensor, length: int, is_even: bool) -> Tensor | None:
        """Set the positions [B, L] that the next forward writes, the last of them `length` - 1.

        is_even: every active row ends at `length`, as a single row always does; inactive rows may
        write anything. Returns the attention mask [B, 1, L, span], True where a query may attend.
        Returns None for one token, or the whole text, of each of such rows: a dynamic cache then
        needs no mask but the causal one.
        """
        self.positions, self.length = positions, length
        self.is_even = is_even or len(positions) == 1
        if self.chosen is not None:
            for layer in self.layers:
                layer.keys, layer.values = layer.keys[self.chosen], layer.values[self.chosen]
            self.chosen = None
        if length > self.capacity:
            self.capacity = max(length, min(2 * self.capacity, self.most))
        if is_even and positions.shape[1] in (1, length) and not self.is_static:
            return None
        keys = torch.arange(self.span, device=positions.device)
        return keys <= positions[:, None, :, None]

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
    def states(self) -> list[Any]:
        """Each layer's keys, then its values, [B, heads, capacity, width] each."""
        return [states for layer in self.layers for states in (layer.keys, layer.values)]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(heads, width) of the keys and of the values of each layer, once they exist."""
        return [(states.shape[1], states.shape[3]) for states in self.states]

    def load(self, parts: Tensor, shapes: list[tuple[int, int]]) -> None:
        """Write the result of `part` of a cache of these shapes from position 0 on: [R, T,
        numbers].
        """
        self.num_rows, self.capacity, self.chosen = len(parts), parts.shape[1], None
        sizes = [heads * width for heads, width in shapes]
        states = [
            part.unflatten(2, shape).transpose(1, 2).contiguous()
            for part, shape in zip(parts.split(sizes, 2), shapes, strict=True)
        ]
        for layer, keys, values in zip(self.layers, states[::2], states[1::2], strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
