"""The differences between the versions of transformers that a checkpoint opens with: 5.0 and newer.

What is here: the only places where the modeling files look at transformers' version, each with the
version that made the difference. All else is identical in every version.

Ships with checkpoints: imports torch and transformers only.
"""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import transformers
from torch import Tensor
from transformers import modeling_layers
from transformers.cache_utils import Cache
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

MtpLayer: Any = getattr(modeling_layers, "MtpLayer", None)
"""transformers' own MTP layer; None before 5.14."""

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))

SELECTS_HIDDEN_STATES = VERSION >= (5, 23)
"""`output_hidden_states=[i]` keeps entry i of the hidden states and no other. Some versions before
5.23 put the output of layer i there, which is entry i + 1."""

ASKS_FOR_QUERIES = hasattr(Cache, "get_query_offset")
"""The cache is asked for the positions of the queries before a mask is made. Before 5.14 it is
asked for nothing but the number of its keys and their offset."""


REPLACES_FORWARD = VERSION < (5, 2)
"""To record hidden states, transformers replaces the `forward` of layers during a call. In a second
thread it would record those of the first. From 5.2 on threads have records of their own."""

ONE_AT_A_TIME = threading.RLock()


def in_turns(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which one call runs at a time where threads would disturb each other."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with ONE_AT_A_TIME:
            return function(*args, **kwargs)

    return called if REPLACES_FORWARD else function


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


def remember_code(opened: Any) -> None:
    """Let a class that was opened by `trust_remote_code=True` save its code with its weights, as
    recent versions do by themselves.
    """
    is_of_checkpoint = opened.__module__.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME
    if is_of_checkpoint and opened._auto_class is None:
        opened.register_for_auto_class("AutoModelForCausalLM")


def offset_of_keys(queries: Any) -> Any:
    """The position of a cache's first key, 0, as transformers asks for it before it makes a mask.

    transformers gives the offset to the mask function as it got it from the cache. Before 5.14 no
    other value goes from one to the other, so the offset is replaced by the positions of the
    queries where these are a tensor. queries: `get_query_offset` of the cache.
    """
    return queries if isinstance(queries, Tensor) and not ASKS_FOR_QUERIES else 0


def positions_of_queries(q_offset: Any = 0, kv_offset: Any = 0, **others: Any) -> Tensor | None:
    """Positions [B, L] of a pass's queries, from the arguments of a mask function; None where
    transformers' own mask is right.
    """
    given = q_offset if ASKS_FOR_QUERIES else kv_offset
    return given if isinstance(given, Tensor) and given.ndim == 2 else None
