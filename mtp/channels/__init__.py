"""Channels: ways to pass more than one token from a forward pass to the next, side by side.

`block` and `token` are those of ordinary runs; the others are comparators, each in a file.
"""

from .block import Block, Token
from .channel import CHANNELS, Channel, WriteOptions, Written, build_channel
from .gated import Gated
from .kv import KV
from .latent import Latent
from .multiplex import Multiplex
from .soft import Soft
from .two_models import TextMessage, TokenMessage
from .vector_memory import VectorMemory

CHANNELS.add("token", Token)
CHANNELS.add("block", Block)
CHANNELS.add("soft", Soft)
CHANNELS.add("multiplex", Multiplex)
CHANNELS.add("latent", Latent)
CHANNELS.add("gated", Gated)
CHANNELS.add("token_message", TokenMessage)
CHANNELS.add("block_message", TextMessage)
CHANNELS.add("kv", KV)
CHANNELS.add("vector_memory", VectorMemory)

__all__ = ["CHANNELS", "Channel", "WriteOptions", "Written", "build_channel"]
