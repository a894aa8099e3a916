"""Divergence of the distributions of two output layers, row by row, without their logits."""

from typing import NamedTuple

from torch import Tensor

from mtp_kernels.checks import check_integers, check_operands, check_scale
from mtp_kernels.dispatch import autocast_operands, is_direct, resolve_impl
from mtp_kernels.linear_kl.op import kl_op
from mtp_kernels.linear_kl.plan import shifted_index
from mtp_kernels.linear_kl.problem import Layer, Problem
from mtp_kernels.linear_kl.reference import linear_kl_reference


class LinearKl(NamedTuple):
    """Per-row results in hidden's leading shape."""

    kl: Tensor
    """float32 divergence in nats; 0 in rows without a teacher."""
    valid: Tensor
    """bool, True where the row has a teacher."""


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    index: Tensor | None = None,
    shift: int = 1,
    document: Tensor | None = None,
    mask: Tensor | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    impl: str = "auto",
) -> LinearKl:
    """KL of each student row to its teacher row, per row:

        q = softmax(x(hidden[row]));   p = softmax(x(teacher_hidden[index[row]]))
        forward = (p * (log p - log q)).sum();   reverse = (q * (log q - log p)).sum()

    with x the scaled logits of `linear_logprob`. Each distinct teacher row is made once, however
    many students meet it: with k slots the forward takes 1 + 1/k matrix products instead of 2.

    Args:
        hidden: [..., D] student hidden states; [B, T, K, D] without index.
        weight: [V, D] student output matrix.
        teacher_hidden: [..., H] teacher hidden states; [B, T, H] without index.
        teacher_weight: [V, H] teacher output matrix; None: the student's, without gradient, with
            its bias unless teacher_bias is given.
        index: [...] int64 row of teacher_hidden, flattened, for each student row; negative for
            none. Without it, slot j at position t meets the teacher's row t + shift - 1 + j: the
            one that predicts the same token as the slot does in `linear_logprob`.
        shift: tokens from a position to what its slot 0 predicts, without index; at least 1.
        document: [B, T] document ids; a teacher row in another document is ignored.
        mask: [B, T] bool, True where a teacher row may be used.
        direction: "forward" is KL(teacher || student), "reverse" is KL(student || teacher).
        temperature, softcap: of both distributions; no factor temperature**2 is applied.
        bias, teacher_bias: [V] added to the student's and to the teacher's logits, or None.
        impl: "auto", "reference", "torch" or "triton".

    Gradients flow to every tensor that requires one; detach the teacher to leave it fixed.
    """
    if teacher_weight is None:
        teacher_weight = weight.detach()
        teacher_bias = bias.detach() if teacher_bias is None and bias is not None else teacher_bias
    operands = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    operands = autocast_operands(*operands)  # type: ignore[assignment]
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = operands
    check_operands(hidden, weight, bias)
    check_operands(teacher_hidden, teacher_weight, teacher_bias)
    check_scale(temperature, softcap)
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            "weight and teacher_weight must share one vocabulary, got "
            f"{weight.shape[0]} and {teacher_weight.shape[0]} rows"
        )
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    lead = hidden.shape[:-1]
    index = _teacher_index(hidden, teacher_hidden, index, shift, document, mask)
    rows = hidden.reshape(-1, hidden.shape[-1])
    teachers = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    impl = resolve_impl(impl, hidden)
    student, teacher = Layer(rows, weight, bias), Layer(teachers, teacher_weight, teacher_bias)
    settings = (index.reshape(-1), direction == "reverse", float(temperature), softcap)
    direct = is_direct(rows.shape[0], weight) and is_direct(rows.shape[0], teacher_weight)
    if impl == "reference" or (impl == "torch" and direct):
        divergence = linear_kl_reference(Problem(student, teacher, *settings))
    else:
        divergence, _ = kl_op(*student, *teacher, *settings, impl)
    return LinearKl(divergence.reshape(lead), index >= 0)


def _teacher_index(
    hidden: Tensor,
    teacher_hidden: Tensor,
    index: Tensor | None,
    shift: int,
    document: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    if index is not None:
        if document is not None or mask is not None:
            raise ValueError("document and mask go without index; put -1 into index instead")
        if index.shape != hidden.shape[:-1]:
            raise ValueError(
                f"index must have hidden's leading shape {tuple(hidden.shape[:-1])}, "
                f"got {tuple(index.shape)}"
            )
        check_integers(index=index)
        return index.long()
    if hidden.ndim != 4 or teacher_hidden.shape[:-1] != hidden.shape[:2]:
        raise ValueError(
            "without index, hidden must be [B, T, K, D] and teacher_hidden [B, T, H]; got "
            f"{tuple(hidden.shape)} and {tuple(teacher_hidden.shape)}"
        )
    if shift < 1:
        raise ValueError(f"shift must be >= 1, got {shift}")
    batch, length, slots = hidden.shape[:3]
    return shifted_index((batch, length, slots), shift, document, mask, hidden.device)
