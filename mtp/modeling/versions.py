"""The differences between the versions of transformers that a checkpoint opens with: 5.0 and newer.

What is here: the only places where the modeling files look at transformers' version, each with the
version that made the difference. All else is identical in every version.

Ships with checkpoints: imports torch and transformers only.
"""

from typing import Any

import transformers
from torch import Tensor
from transformers.cache_utils import Cache

SELECTS_HIDDEN_STATES = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
"""`output_hidden_states=[i]` keeps entry i of the hidden states and no other. Some versions before
5.23 put the output of layer i there, which is entry i + 1."""

ASKS_FOR_QUERIES = hasattr(Cache, "get_query_offset")
"""The cache is asked for the positions of the queries before a mask is made. Before 5.14 it is
asked for the number of keys only."""


def wanted_states(taps: list[int]) -> list[int] | bool | None:
    """The value of `output_hidden_states` with which entry i is right for each i of the taps."""
    if not taps:
        return None
    return taps if SELECTS_HIDDEN_STATES else True


def set_activation_checkpointing(model: Any, is_on: bool) -> None:
    """Recompute activations in the backward pass, or not. 5.23 renamed the two methods and warns of
    the earlier names.
    """
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if is_on:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


def gguf_options() -> dict[str, Any]:
    """The arguments of `from_pretrained` that unpack the weights of a GGUF file, which makes them
    trainable. Versions without `GgufConfig` always do so.
    """
    made = getattr(transformers, "GgufConfig", None)
    return {} if made is None else {"quantization_config": made(dequantize=True)}


class NumKeys(int):
    """A number of keys, with the positions of the queries that look at them.

    transformers gives the number to the mask function as it got it from the cache. Before 5.14 this
    is the only value that goes from one to the other.
    """

    queries: Any

    def __new__(cls, number: int, queries: Any) -> "NumKeys":
        made = super().__new__(cls, number)
        made.queries = queries
        return made


def num_keys(number: int, queries: Any) -> int:
    """The number of keys as a cache gives it to transformers; queries: `get_query_offset` of it."""
    return number if ASKS_FOR_QUERIES else NumKeys(number, queries)


def positions_of_queries(q_offset: Any, kv_length: int) -> Tensor | None:
    """Positions [B, L] of a pass's queries, from the arguments of a mask function; None where
    transformers' own mask is right.
    """
    given = q_offset if ASKS_FOR_QUERIES else getattr(kv_length, "queries", None)
    return given if isinstance(given, Tensor) and given.ndim == 2 else None
