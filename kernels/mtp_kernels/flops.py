"""FLOPs of this package's operators for `torch.utils.flop_counter.FlopCounterMode`.

An operator hides its matrix products from the counter. Importing this module registers them; it is
not imported with the operators, since the counter loads Triton. As for torch's own operators only
matrix products count. Every row counts, also one whose target is ignored.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from mtp_kernels.linear_kl import op as _kl  # noqa: F401
from mtp_kernels.linear_logprob import op as _logprob  # noqa: F401
from mtp_kernels.linear_loss import op as _loss  # noqa: F401
from mtp_kernels.linear_sample import op as _sample  # noqa: F401
from mtp_kernels.linear_verify import op as _verify  # noqa: F401

Shape = Sequence[int]
ops = torch.ops.mtp_kernels


def products(hidden: Shape, weight: Shape, number: int = 1) -> int:
    """FLOPs of `number` products of rows [R, D] with a matrix [V, D]: logits or a gradient."""
    return 2 * number * hidden[0] * weight[0] * weight[1]


@register_flop_formula(ops.linear_loss)
def loss_flops(hidden: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """Logits, and the gradients by `hidden` and `weight` where they are needed."""
    return products(hidden, weight, 1 + sum(rest[-1][:2]))


@register_flop_formula([ops.linear_logprob, ops.linear_sample])
def logits_flops(hidden: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Logits."""
    return products(hidden, weight)


@register_flop_formula(ops.linear_logprob_backward)
def logprob_backward_flops(hidden: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """Logits once more, and the gradients by `hidden` and `weight` where they are needed."""
    return products(hidden, weight, 1 + sum(rest[-1][:2]))


def _rows(hidden: Shape, teacher_hidden: Shape) -> Shape:
    """[number of the teacher's rows that are read, at most]: several students may read one."""
    return [min(hidden[0], teacher_hidden[0])]


@register_flop_formula(ops.linear_kl)
def kl_flops(
    hidden: Shape,
    weight: Shape,
    bias: Shape | None,
    teacher_hidden: Shape,
    teacher_weight: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """Logits of the students and of the teacher rows."""
    rows = _rows(hidden, teacher_hidden)
    return products(hidden, weight) + products(rows, teacher_weight)


@register_flop_formula(ops.linear_kl_backward)
def kl_backward_flops(
    hidden: Shape,
    weight: Shape,
    bias: Shape | None,
    teacher_hidden: Shape,
    teacher_weight: Shape,
    *rest: Any,
    **_: Any,
) -> int:
    """Logits once more, and gradients by hidden rows and weights where they are needed."""
    needs, rows = rest[-1], _rows(hidden, teacher_hidden)
    return products(hidden, weight, 1 + sum(needs[:2])) + products(
        rows, teacher_weight, 1 + sum(needs[3:5])
    )


@register_flop_formula(ops.linear_verify_residual)
def residual_flops(
    hidden: Shape,
    weight: Shape,
    bias: Shape | None,
    lse: Shape,
    draft_hidden: Shape,
    draft_weight: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """Logits of main and of the draft."""
    return products(hidden, weight) + products(draft_hidden, draft_weight)
