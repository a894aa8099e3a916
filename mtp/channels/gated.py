"""Gated: a sampled token with main's distribution mixed in (HRPO, Yue et al., arXiv 2505.18454).

    x = a * e + sqrt(1 - a^2) * i * s        s = (p E) / |p|       e: embedding of the token
    r = sigmoid(W_r e), i = sigmoid(W_i e), a = exp(-8 softplus(-L) r)

with a learned gate per dimension that begins close to 1, the plain token. A pass samples one token,
so its log-probability is the token's, and s is part of the record: replay is one forward.
Supervision trains main on plain tokens, and RL opens the gate, as in the paper.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.bounds import bounded
from .vectors import Thought, VectorChannel

LARGEST_START = 0.999
SHARPNESS = 8.0


@dataclass(kw_only=True)
class GatedOptions:
    """Settings of `channel.name=gated`."""

    start: float = bounded(0.98, above=0, below=0.999)
    """Smallest share a of the token at the start of RL, where r = 1; the dimensions are spread
    between this and 0.999."""


class Gated(VectorChannel):
    """A token and a gated share of main's distribution."""

    options_class = GatedOptions
    follows_layers = False

    def __init__(self, options: GatedOptions, width: int):
        super().__init__(options, width)
        self.r_proj = nn.Linear(width, width)
        self.i_proj = nn.Linear(width, width)
        share = torch.linspace(options.start, LARGEST_START, width)
        self.gate = nn.Parameter(-(torch.expm1(-share.log() / SHARPNESS)).log())

    def sample_thought(
        self, log_q: Tensor, embedding: nn.Embedding, greedy: bool, generator: torch.Generator
    ) -> Thought:
        q = log_q.exp()
        ids = q.argmax(-1, keepdim=True) if greedy else torch.multinomial(q, 1, generator=generator)
        return Thought(ids, (q @ embedding.weight) / q.norm(dim=-1, keepdim=True))

    def vectors(self, embedding: nn.Embedding, ids: Tensor, record: Tensor) -> Tensor:
        token = embedding(ids[:, 0])
        opens, lets_in = self.r_proj(token).sigmoid(), self.i_proj(token).sigmoid()
        log_share = -SHARPNESS * F.softplus(-self.gate) * opens
        rest = (-torch.expm1(2 * log_share)).clamp(min=1e-12).sqrt()
        return log_share.exp() * token + rest * lets_in * record

    def log_density(
        self, log_q: Tensor, embedding: nn.Embedding, ids: Tensor, record: Tensor
    ) -> Tensor:
        return log_q.gather(-1, ids[:, :1])[:, 0]
