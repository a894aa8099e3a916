"""The output layer of an emitter, which maps its hidden rows to logits.

    logits = softcap * tanh((scale * hidden @ weight.T + bias) / softcap)

The model returns it together with hidden rows. Samplers and losses use `logits`, or pass `rows`,
`weight` and `options` to an op of `mtp_kernels`, which computes no logits.

Ships with checkpoints: imports torch and siblings only.

Shapes: V vocabulary, E width of the emitter's hidden rows.
"""

from typing import Any, TypedDict

import torch
from torch import Tensor

from .cache import in_autocast_dtype
from .matrices import plain_matrix


class OutputOptions(TypedDict):
    """Arguments of an op of `mtp_kernels` in addition to the rows and the matrix."""

    bias: Tensor | None
    softcap: float | None


MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
"""Fields of a config that multiply the logits."""
DIVISOR = "logits_scaling"
"""The field that divides them, except in the families of `MULTIPLIED_BY_DIVISOR`."""
MULTIPLIED_BY_DIVISOR = ("hyperclovax",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_softcap")
"""Fields of a config that bound the logits."""
WITHOUT_SCALE = ("mpt",)
"""Families whose config has a field of that name which their output layer does not read."""


def scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """The scale and softcap of main's logits, from its config; `contract.py` checks them."""
    scale = 1.0
    if config.model_type not in WITHOUT_SCALE:
        for name in MULTIPLIERS:
            value = getattr(config, name, None)
            scale *= 1.0 if value is None else float(value)
    divisor = getattr(config, DIVISOR, None)
    if divisor is not None:
        in_family = config.model_type in MULTIPLIED_BY_DIVISOR
        scale = scale * float(divisor) if in_family else scale / float(divisor)
    caps = [getattr(config, name, None) for name in SOFTCAPS]
    return scale, next((float(cap) for cap in caps if cap is not None), None)


class OutputLayer:
    """Matrix, scale, bias and softcap of an output layer.

    A plain class: two emitters that share a layer share the object, and Fabric, which converts the
    tensors of what a forward returns, leaves the matrix as it is.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
    ):
        """weight: [V, E]; bias: [V], added to the logits; scale: multiplies `hidden @ weight.T`;
        softcap: bound of the logits' size, None for none.
        """
        self.weight, self.bias, self.scale, self.softcap = weight, bias, scale, softcap

    @classmethod
    def from_module(cls, module: Any, name: str) -> "OutputLayer":
        """The layer that a module computes.

        Raises ValueError, with the given `name` of the module, if it has any effect beyond its
        weight (`matrices.py`).
        """
        return cls(plain_matrix(module, name))

    @classmethod
    def of_main(cls, module: Any, config: Any, name: str) -> "OutputLayer":
        """Main's: a module's weight and bias, with the scale and softcap that its config gives.

        Raises ValueError as `from_module` does, but for a bias.
        """
        weight = plain_matrix(module, name, with_bias=True)
        return cls(weight, module.bias, *scale_and_softcap(config))

    @property
    def options(self) -> OutputOptions:
        """Keyword arguments of an op of `mtp_kernels` that is given `rows(hidden)` and `weight`."""
        return {"bias": self.bias, "softcap": self.softcap}

    def rows(self, hidden: Tensor) -> Tensor:
        """Hidden rows [..., E], multiplied by the scale."""
        return hidden if self.scale == 1.0 else hidden * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] hidden rows -> [..., V] logits."""
        logits = self.rows(hidden) @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def replaced(self, weight: Tensor, bias: Tensor | None) -> "OutputLayer":
        """The same layer with other tensors."""
        return OutputLayer(weight, bias, self.scale, self.softcap)

    def detach(self) -> "OutputLayer":
        """The same layer without gradient."""
        return self.replaced(
            self.weight.detach(), None if self.bias is None else self.bias.detach()
        )

    def in_autocast_dtype(self) -> "OutputLayer":
        """The same layer in the dtype that autocast would cast it to; itself without autocast."""
        weight = in_autocast_dtype(self.weight)
        if weight is self.weight:
            return self
        return self.replaced(weight, None if self.bias is None else in_autocast_dtype(self.bias))
