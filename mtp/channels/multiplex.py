"""Multiplex: M tokens sampled independently at each pass, and the next pass reads their mean.

Multiplex Thinking (Tang et al. 2026) and the multi-token sampling of CoT2 (Gozeten et al., arXiv
2505.23648). The tokens are discrete, so the log-probability of a pass is the sum of theirs: the
policy gradient is exact, and replay is one forward.

A greedy thought does not exist: the mean of M samples is what carries several possibilities. So
evaluations sample it too.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common.bounds import bounded
from .vectors import Thought, VectorChannel


@dataclass(kw_only=True)
class MultiplexOptions:
    """Settings of `channel.name=multiplex`."""

    num_tokens: int = bounded(3, at_least=1, at_most=64)
    """Number of tokens sampled at each pass of a thought, M."""


class Multiplex(VectorChannel):
    """M sampled tokens, averaged."""

    options_class = MultiplexOptions
    is_random = True

    def sample_thought(
        self, log_q: Tensor, embedding: nn.Embedding, greedy: bool, generator: torch.Generator
    ) -> Thought:
        ids = torch.multinomial(
            log_q.exp(), self.options.num_tokens, replacement=True, generator=generator
        )
        return Thought(ids, log_q.new_empty(len(ids), 0))

    def vectors(self, embedding: nn.Embedding, ids: Tensor, record: Tensor) -> Tensor:
        return embedding(ids).mean(-2)

    def log_density(
        self, log_q: Tensor, embedding: nn.Embedding, ids: Tensor, record: Tensor
    ) -> Tensor:
        return log_q.gather(-1, ids).sum(-1)

    def teach(self, sets: list[list[int]], rng: random.Random) -> list[list[int]]:
        """M tokens of each set, sampled as the channel samples them."""
        return [rng.choices(tokens, k=self.options.num_tokens) for tokens in sets]
