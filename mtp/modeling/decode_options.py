"""How to decode: the options that travel together, and what the pass loop needs of a model.

Ships with checkpoints: imports torch and siblings only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .cache import BlockCache
from .decode_state import Stop
from .heads import Head
from .output_layer import OutputLayer
from .sampler import Sampler

Process = Callable[[Tensor, Tensor], Tensor]
"""What a `LogitsProcessor` does: token ids [B, T] and scores [B, V] -> scores [B, V]."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Options of decoding that are the same for all rows of a batch."""

    sampler: Sampler = field(default_factory=Sampler)
    """Distribution that tokens are sampled from."""
    max_new_tokens: int
    """Maximum number of new tokens of a text, or of a segment; a last block is cut to it."""
    pad_id: int = 0
    """Token id that fills the unused end of each row."""
    generator: torch.Generator | None = None
    """Source of randomness for sampling."""
    seeds: Tensor | None = None
    """[rows] int64 seed of each row of the batch, in place of `generator`: the noise of a token is
    then a function of its row's seed and its position in the text, whatever the batch is."""
    process: Process | None = None
    """Changes the scores of every slot, main's and the head's, before the sampler. It is given the
    texts up to the slot, padded on the left to T and the tokens written since: rows of one width at
    a time."""
    stop: Stop | None = None
    """Stopping criterion, asked after every token with texts as above; a block is cut where it says
    True."""
    any_continues: Callable[[bool], bool] | None = None
    """Called after every pass with whether a row goes on here; returns whether one does in any of
    the processes that share main's layers, which then run one more pass together."""
    static_cache: bool = False
    """Keep keys and values at one length from the first pass on, see `BlockCache`."""
    impl: str | None = None
    """Implementation of `mtp_kernels` that samples tokens and verifies drafts without logits,
    `auto` for one where it pays; None: none. Logits are made in any case where something else asks
    for them: top-k and top-p, a `process`, thresholds."""

    def check(self) -> None:
        """Raises ValueError for an impossible value."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.seeds is not None and self.generator is not None:
            raise ValueError("seeds must be left out beside a generator; give one of them")


class DecodableModel(Protocol):
    """What decoding needs of a model; an `MTPMixin` model has it."""

    config: Any
    training: bool
    mtp_head: Head

    @property
    def block_size(self) -> int:
        """K + 1: the most tokens of one pass."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training, or to evaluation."""

    def output_layers(self, channel_gradient: float = 1.0) -> tuple[OutputLayer, OutputLayer]:
        """The output layers of main and of the head, one object where the head uses main's."""

    def main_states(
        self,
        fed: Tensor,
        start: Tensor,
        cache: BlockCache,
        length: int,
        *,
        is_even: bool = False,
        with_taps: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """One pass of main over tokens [B, L] through the cache: hidden rows, and those of taps."""

    def head_embed(self, tokens: Tensor, channel_gradient: float = 1.0) -> Tensor:
        """Embeddings of tokens as the head reads them."""
