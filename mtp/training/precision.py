"""A cast of a model's weights that leaves what needs float32 as it is, as transformers does.

`module.to(torch.bfloat16)` rounds buffers too. Rotary frequencies then have 8 bits, and positions
beyond a few hundred tokens turn by other angles than in the same checkpoint opened by transformers.
"""

from typing import Any

import torch
from torch import Tensor


def keeps_float32(model: Any, name: str) -> bool:
    """True for a weight of a module that the family keeps in float32."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(f".{one}." in f".{name}." for one in kept)


def cast_state(model: Any, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights to save, cast but for buffers and what the family keeps in float32.

    Tied weights stay one tensor. state: may have weights by names that the model does not know.
    """
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    done, saved = dict[tuple[Any, ...], Tensor](), dict(state)
    for name, weight in state.items():
        if name in buffers or not weight.is_floating_point() or keeps_float32(model, name):
            continue
        memory = weight.data_ptr(), weight.shape
        if memory not in done:
            done[memory] = weight.to(dtype)
        saved[name] = done[memory]
    return saved


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place, but for those that the family keeps in float32."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not keeps_float32(model, name):
            parameter.data = parameter.data.to(dtype)
