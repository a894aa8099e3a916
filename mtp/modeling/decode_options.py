"""Options of decoding, passed around as one object, and the interface that the pass loop needs of a
model.

Ships with checkpoints: imports torch and siblings only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .cache import BlockCache
from .compiled import Compiler
from .decode_state import Stop, Stops
from .heads import Head
from .output_layer import OutputLayer
from .sampler import Sampler

Process = Callable[..., Tensor]
"""Signature of a `LogitsProcessorList`: token ids [B, T], scores [B, V] and, by name, `padding` [B]
-> scores [B, V]."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Options of decoding that are the same for all rows of a batch."""

    sampler: Sampler = field(default_factory=Sampler)
    """Distribution that tokens are sampled from."""
    max_new_tokens: int
    """Maximum number of new tokens of a text, or of a segment; a last block is cut to it."""
    limits: Tensor | None = None
    """[rows] int64 maximum of each row of the batch, at most `max_new_tokens`; None: that."""
    pad_id: int = 0
    """Token id that fills the unused end of each row."""
    generator: torch.Generator | None = None
    """Source of randomness for sampling."""
    seeds: Tensor | None = None
    """[rows] int64 seed of each row of the batch, in place of `generator`: the noise of a token is
    then a function of its row's seed and its position in the text, whatever the batch is."""
    process: Process | None = None
    """Changes the scores of every slot, main's and the head's, before the sampler. It receives rows
    of one width at a time: texts up to the slot, padded on the left to T plus the new tokens.
    `padding` is the number of padded columns of each text."""
    stop: Stop | Stops | None = None
    """Stopping criterion, called after every token with texts as above; a block is cut where it
    returns True. `Stops` for one that is called with all rows of a batch at once."""
    any_continues: Callable[[bool], bool] | None = None
    """Called after every pass with True if a row continues here; returns True if one continues in
    any of the processes that share main's layers, which then run one more pass together."""
    static_cache: bool = False
    """Keep keys and values at one length from the first pass on, see `BlockCache`."""
    compiler: Compiler | None = None
    """Compile main's passes after the prompts' own, see `compiled.py`; None: do not."""
    impl: str | None = None
    """Implementation of `mtp_kernels` that samples tokens and verifies drafts without logits,
    `auto` for the faster choice; None: none. Logits are computed in any case where top-k, top-p, a
    `process` or thresholds need them."""

    def check(self) -> None:
        """Raises ValueError for an impossible value."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.seeds is not None and self.generator is not None:
            raise ValueError("seeds must be left out beside a generator; give one of them")


class DecodableModel(Protocol):
    """Interface that decoding needs of a model; an `MTPMixin` model has it."""

    config: Any
    main_config: Any
    """The config of main as a language model: `config`, or its part that is about text."""
    reads_whole_text: bool
    """True where main keeps nothing between passes and reads each row's text from its beginning."""
    training: bool
    mtp_head: Head

    @property
    def block_size(self) -> int:
        """Maximum number of tokens per pass, K + 1."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training, or to evaluation."""

    def output_layers(self, channel_gradient: float = 1.0) -> tuple[OutputLayer, OutputLayer]:
        """The output layers of main and of the head, one object if the head uses main's."""

    def main_states(
        self,
        fed: Tensor,
        start: Tensor,
        cache: BlockCache,
        length: int,
        *,
        is_even: bool = False,
        with_taps: bool = True,
        last: Tensor | None = None,
        decoder: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """One pass of main over tokens [B, L] through the cache: hidden rows and tap rows."""

    def head_embed(self, tokens: Tensor, channel_gradient: float = 1.0) -> Tensor:
        """Embeddings of tokens as the head reads them."""
