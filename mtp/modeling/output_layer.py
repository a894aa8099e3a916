"""The output layer of an emitter, which maps its hidden rows to logits.

    logits = softcap * tanh((scale * hidden @ weight.T + bias) / softcap)

The model returns it together with hidden rows. Samplers and losses use `logits`, or pass `rows`,
`weight` and `options` to an op of `mtp_kernels`, which computes no logits.

A head may write a part of the vocabulary only, its draft vocabulary. Its layer then has a row for
each token of that part, and the logits of all other tokens are -inf. Row numbers are the ids that
ops know: `rows_of` and `ids_of` convert.

Ships with checkpoints: imports torch and siblings only.

Shapes: V vocabulary, W rows of the matrix (V, or the draft vocabulary), E width of the emitter's
hidden rows.
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


def rows_of(tokens: Tensor, ids: Tensor) -> Tensor:
    """Row numbers of token ids [...] in a matrix whose row i is tokens[i], ascending; some row for
    an id without one.
    """
    return torch.searchsorted(tokens, ids.contiguous()).clamp(max=len(tokens) - 1)


def has_row(tokens: Tensor | None, ids: Tensor) -> Tensor:
    """True for token ids [...] that are among `tokens` [W], ascending; None: all are."""
    return (
        torch.ones_like(ids, dtype=torch.bool)
        if tokens is None
        else (tokens[rows_of(tokens, ids)] == ids)
    )


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
        tokens: Tensor | None = None,
        vocab_size: int = 0,
    ):
        """weight: [W, E]; bias: [W], added to the logits; scale: multiplies `hidden @ weight.T`;
        softcap: bound of the logits' size, None for none; tokens: [W] int64 ids of the rows,
        ascending, among `vocab_size`; None: row i is token i.
        """
        self.weight, self.bias, self.scale, self.softcap = weight, bias, scale, softcap
        self.tokens, self.vocab_size = tokens, vocab_size

    @classmethod
    def from_module(
        cls, module: Any, name: str, tokens: Tensor | None = None, vocab_size: int = 0
    ) -> "OutputLayer":
        """The layer that a module computes; tokens and vocab_size as in the constructor.

        Raises ValueError, with the given `name` of the module, if it has any effect beyond its
        weight (`matrices.py`).
        """
        return cls(plain_matrix(module, name), tokens=tokens, vocab_size=vocab_size)

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
        """[..., E] hidden rows -> [..., V] logits; -inf for tokens without a row."""
        logits = self.row_logits(hidden)
        if self.tokens is None:
            return logits
        none = logits.new_full((*logits.shape[:-1], self.vocab_size), -torch.inf)
        return none.index_copy(-1, self.tokens, logits)

    def row_logits(self, hidden: Tensor) -> Tensor:
        """[..., E] hidden rows -> [..., W] logits of the matrix's rows."""
        logits = self.rows(hidden) @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def ids_of(self, rows: Tensor) -> Tensor:
        """Token ids of row numbers [...]."""
        return rows if self.tokens is None else self.tokens[rows]

    def rows_of(self, ids: Tensor) -> Tensor:
        """Row numbers of token ids [...]; some row for a token without one, see `has_row`."""
        return ids if self.tokens is None else rows_of(self.tokens, ids)

    def has_row(self, ids: Tensor) -> Tensor:
        """True for token ids [...] that have a row, whose logits are finite."""
        return has_row(self.tokens, ids)

    def given(self, tokens: Tensor | None) -> "OutputLayer":
        """The layer of the distribution conditioned on the token being one of `tokens` [W].

        Its row i is tokens[i]. None: the layer itself.
        """
        if tokens is None:
            return self
        bias = None if self.bias is None else self.bias[tokens]
        return OutputLayer(self.weight[tokens], bias, self.scale, self.softcap)

    def replaced(self, weight: Tensor, bias: Tensor | None) -> "OutputLayer":
        """The same layer with other tensors."""
        return OutputLayer(weight, bias, self.scale, self.softcap, self.tokens, self.vocab_size)

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
