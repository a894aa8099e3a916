"""FLOPs of this package's operators for `torch.utils.flop_counter.FlopCounterMode`.

An operator hides its matrix products from the counter. Importing this module registers them; it is
not imported with the operators, since the counter loads Triton. As for torch's own operators only
matrix products count. Every row counts, also one whose target is ignored.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]
ops = torch.ops.mtp_kernels


def products(hidden: Shape, weight: Shape, number: int = 1) -> int:
    """FLOPs of `number` products of rows [R, D] with a matrix [V, D]: logits or a gradient."""
    return 2 * number * hidden[0] * weight[0] * weight[1]


@register_flop_formula([ops.linear_loss, ops.linear_logprob_backward])
def gradient_flops(hidden: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """Logits, and the gradients by `hidden` and `weight` where they are needed."""
    return products(hidden, weight, 1 + sum(rest[-1][:2]))


@register_flop_formula([ops.linear_logprob, ops.linear_sample])
def logits_flops(hidden: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Logits."""
    return products(hidden, weight)


def divergence_flops(operands: Sequence[Any], student: int, teacher: int) -> int:
    """Products of the students and of the teacher's rows, of which several students may read one.

    operands: of `linear_kl`, or of its backward.
    """
    hidden, weight, _, teacher_hidden, teacher_weight = operands[:5]
    rows = [min(hidden[0], teacher_hidden[0])]  # that are read, at most
    return products(hidden, weight, student) + products(rows, teacher_weight, teacher)


@register_flop_formula(ops.linear_kl)
def kl_flops(*operands: Any, **_: Any) -> int:
    """Logits of the students and of the teacher's rows."""
    return divergence_flops(operands, 1, 1)


@register_flop_formula(ops.linear_kl_backward)
def kl_backward_flops(*operands: Any, **_: Any) -> int:
    """Logits once more, and gradients by hidden rows and weights where they are needed."""
    needs = operands[-1]
    return divergence_flops(operands, 1 + sum(needs[:2]), 1 + sum(needs[3:5]))


@register_flop_formula(ops.linear_verify_residual)
def residual_flops(*operands: Any, **_: Any) -> int:
    """Logits of main and of the draft."""
    hidden, weight, _bias, _lse, draft_hidden, draft_weight = operands[:6]
    return products(hidden, weight) + products(draft_hidden, draft_weight)
