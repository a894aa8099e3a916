"""A head with memory of past positions, as someone outside the package would write it."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mtp.modeling.heads import Head, HeadLinear, HeadRMSNorm


@dataclass
class Options:
    num_heads: int = 2
    """Attention heads over the text."""


class AttendingHead(Head):
    """Attends to the taps and tokens of all positions up to the anchor, as EAGLE's draft does."""

    options_class = Options
    num_cache_layers = 1

    def __init__(self, settings, config, num_taps):
        super().__init__(settings, config, num_taps)
        width, main_width = settings.hidden_size, config.hidden_size
        self.num_heads = settings.read_options().num_heads
        self.token_embed = torch.nn.Embedding(config.vocab_size, width)
        self.tap_proj = HeadLinear(num_taps * main_width, width)
        self.qkv_proj = HeadLinear(width, 3 * width)
        self.slot_proj = HeadLinear(main_width, width)
        self.norm = HeadRMSNorm(width, eps=1e-6)
        self.out_proj = HeadLinear(width, main_width)

    def states(self, taps, tokens):
        """[R, L, taps, D] and [R, L] -> queries, keys and values [R, heads, L, d]."""
        x = F.normalize(self.tap_proj(taps.flatten(-2)), dim=-1) + self.token_embed(tokens)
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1))
        return qkv.permute(2, 0, 3, 1, 4)

    def observe(self, taps, tokens, start, embed, remember):
        queries, keys, values = self.states(torch.stack(taps, 2), tokens)
        return [queries, *remember(0, keys, values)]

    def context(self, observed, at, position):
        queries, keys, values = observed
        row = torch.arange(len(at))
        query = queries[row, :, at][:, :, None]
        seen = torch.arange(keys.shape[2]) <= position[:, None]
        found = F.scaled_dot_product_attention(query, keys, values, seen[:, None, None])
        return [found.flatten(1)]

    def replay_context(self, taps, tokens, anchors, embed):
        found = F.scaled_dot_product_attention(*self.states(taps, tokens), is_causal=True)
        return [found.transpose(1, 2).flatten(2).flatten(0, 1)[anchors]]

    def forward(self, context, embeds):
        return self.step(context, embeds, 0, None)[0]

    def step(self, context, embeds, slot, state):
        x = self.slot_proj(embeds).cumsum(1) + (0 if state is None else state)
        return self.out_proj(self.norm(context[0][:, None] + x)), x[:, -1:]
