"""Soft: the next pass reads the mean embedding under main's distribution, p E.

Soft Thinking (Zhang et al., arXiv 2505.15778). Without noise it is deterministic and has no
log-probability. With noise, p E + s N(0, I), a sampled thought has the density of a Gaussian around
p E (Butt et al., arXiv 2509.19170), so RL can train it; replay is one forward over the recorded
vectors. Noise is on in sampling and in training on solved examples, and off in greedy thoughts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common.bounds import bounded
from .vectors import Thought, VectorChannel, likely_tokens


@dataclass(kw_only=True)
class SoftOptions:
    """Settings of `channel.name=soft`."""

    noise: float = bounded(0.33, above=0)
    """Standard deviation of the noise, as a multiple of the root mean square of the entries of
    main's embedding matrix."""


class Soft(VectorChannel):
    """Main's distribution as a mean of embeddings, with Gaussian noise."""

    options_class = SoftOptions

    def deviation(self, embedding: nn.Embedding) -> Tensor:
        """Standard deviation of the noise []."""
        return self.options.noise * embedding.weight.detach().square().mean().sqrt()

    def sample_thought(
        self, log_q: Tensor, embedding: nn.Embedding, greedy: bool, generator: torch.Generator
    ) -> Thought:
        mean = log_q.exp() @ embedding.weight
        if not greedy:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            mean = mean + self.deviation(embedding) * noise
        return Thought(likely_tokens(log_q), mean)

    def vectors(self, embedding: nn.Embedding, ids: Tensor, record: Tensor) -> Tensor:
        return record

    def log_density(
        self, log_q: Tensor, embedding: nn.Embedding, ids: Tensor, record: Tensor
    ) -> Tensor:
        """log N(record; q E, s^2 I)."""
        deviation = self.deviation(embedding)
        away = (record - log_q.exp() @ embedding.weight) / deviation
        constant = away.shape[-1] * (deviation.log() + 0.5 * math.log(2 * math.pi))
        return -0.5 * away.square().sum(-1) - constant

    def taught_vectors(self, vectors: Tensor, embedding: nn.Embedding, seed: int) -> Tensor:
        generator = torch.Generator(device=vectors.device).manual_seed(seed)
        noise = torch.randn(vectors.shape, generator=generator, device=vectors.device)
        return vectors + self.deviation(embedding) * noise
