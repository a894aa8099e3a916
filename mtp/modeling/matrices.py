"""Output matrices, read directly from their modules.

Decoding and losses multiply hidden rows by an output matrix themselves, to avoid logits. Anything
else that the module does would then be skipped: an adapter would add nothing, a hook would not run,
a quantized or offloaded weight would not be loaded. Such a module is refused here, since the result
would be that of another model.

Ships with checkpoints: imports torch only.
"""

from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (nn.Linear.forward, nn.Embedding.forward)
"""Forward functions that depend on the module's weight alone."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain_matrix(module: Any, name: str, *, with_bias: bool = False) -> Tensor:
    """The weight [V, D] of a linear layer or an embedding that has no effect beyond its weight.

    with_bias: the caller reads the layer's bias too, so it may have one.

    Raises ValueError for any other module; `name` is what the error calls it.
    """
    found = beyond_weight(module, with_bias)
    if found is not None:
        raise ValueError(
            f"{name} must be a plain nn.Linear or nn.Embedding with a dense weight in memory: mtp "
            f"reads only its weight; got {found}. Merge adapters first (merge_and_unload()), and "
            "load this layer without device_map, quantization and hooks"
        )
    weight: Tensor = module.weight
    return weight


def beyond_weight(module: Any, with_bias: bool = False) -> str | None:
    """Description of what a module does beyond multiplying by a dense weight; None: nothing."""
    kind = type(module)
    if getattr(kind, "forward", None) not in PLAIN:
        return f"a {kind.__name__}"
    if "forward" in vars(module):
        return f"a {kind.__name__} whose forward was replaced (as accelerate does for device_map)"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"a {kind.__name__} whose weight is computed or stored by other means"
    if weight.is_meta or weight.layout != torch.strided or weight.dtype not in DTYPES:
        return f"a weight of {weight.dtype} on {weight.device}"
    if not with_bias and module._parameters.get("bias") is not None:
        return f"a {kind.__name__} with a bias"
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    names = [getattr(hook, "__name__", type(hook).__name__) for hook in hooks]
    # This hook, of transformers and peft, enables gradients and changes no number.
    names = [name for name in names if not name.startswith("make_inputs_require_grad")]
    return f"a {kind.__name__} with the hook {names[0]}" if names else None
