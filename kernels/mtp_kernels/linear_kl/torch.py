"""`linear_kl` in chunks of teacher rows, each of which is made once for all of its students.

With p the teacher, q the student, and t, s their scaled logits:

    forward KL(p || q) = sum p (log p - log q)    ds = q - p    dt = p (log p - log q - KL)
    reverse KL(q || p) = sum q (log q - log p)    dt = p - q    ds = q (log q - log p - KL)
"""

import torch
from torch import Tensor

from mtp_kernels.dispatch import maybe_compiled, rows_per_chunk, statistics_dtype
from mtp_kernels.linear_kl.plan import chunks, make_plan
from mtp_kernels.logits import accumulate_weight, product, scale, unscale
from mtp_kernels.rowstats import NEGATIVE


def log_probs(
    raw: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    """[R, V] log-probabilities of raw products, finite."""
    x = scale(raw, bias, softcap, temperature)
    return torch.log_softmax(x, -1).clamp_min(NEGATIVE)


def divergence_of_chunk(
    raw: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    place: Tensor,
    reverse: bool,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """([S] divergences, [S] lse) of raw [S, V] to the rows `place` of teacher log-probs [U, V]."""
    x = scale(raw, bias, softcap, temperature)
    lse = torch.logsumexp(x, -1)
    log_q = (x - lse[:, None]).clamp_min(NEGATIVE)
    log_p = teacher[place]
    if reverse:
        return (log_q.exp() * (log_q - log_p)).sum(-1), lse
    return (log_p.exp() * (log_p - log_q)).sum(-1), lse


def gradient_of_chunk(
    raw: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    place: Tensor,
    divergence: Tensor,
    lse: Tensor,
    grad: Tensor,
    reverse: bool,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """[S, V] gradient by the students' raw products, in their dtype."""
    x = scale(raw, bias, softcap, temperature)
    log_q = (x - lse[:, None]).clamp_min(NEGATIVE)
    log_p = teacher[place]
    if reverse:
        ds = log_q.exp() * (log_q - log_p - divergence[:, None])
    else:
        ds = log_q.exp() - log_p.exp()
    return unscale(ds * grad[:, None], x, softcap, temperature).to(raw.dtype)


def teacher_gradient_of_chunk(
    raw: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    place: Tensor,
    divergence: Tensor,
    lse: Tensor,
    grad: Tensor,
    reverse: bool,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """[S, V] each student's part of the gradient by its teacher's scaled logits."""
    x = scale(raw, bias, softcap, temperature)
    log_q = (x - lse[:, None]).clamp_min(NEGATIVE)
    log_p = teacher[place]
    if reverse:
        dt = log_p.exp() - log_q.exp()
    else:
        dt = log_p.exp() * (log_p - log_q - divergence[:, None])
    return dt * grad[:, None]


def chunk_sizes(students: int, teachers: int, vocab: int, operand: Tensor) -> tuple[int, int]:
    """(teacher rows, student rows) whose logits are in memory at once."""
    return (
        rows_per_chunk(max(teachers, 1), vocab, operand, buffers=2, tall=True),
        rows_per_chunk(max(students, 1), vocab, operand, buffers=2, tall=True),
    )


def divergence_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    index: Tensor,
    reverse: bool,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """([R] divergences, [R] the students' lse), 0 where index [R] is negative."""
    vocab = weight.shape[0]
    plan = make_plan(index)
    out = hidden.new_zeros(hidden.shape[0], dtype=statistics_dtype(hidden))
    lse = torch.zeros_like(out)
    scaling = (temperature, softcap)
    sizes = chunk_sizes(plan.students.shape[0], plan.teachers.shape[0], vocab, hidden)
    teacher_body = maybe_compiled(log_probs, hidden.shape[0], vocab)
    body = maybe_compiled(divergence_of_chunk, hidden.shape[0], vocab)
    for chunk in chunks(plan, *sizes):
        rows = teacher_hidden[plan.teachers[chunk.teachers]]
        teacher = teacher_body(product(rows, teacher_weight), teacher_bias, *scaling)
        for part in chunk.students:
            students = plan.students[part]
            raw = product(hidden[students], weight)
            place = plan.place[part] - chunk.teachers.start
            out[students], lse[students] = body(raw, bias, teacher, place, reverse, *scaling)
    return out, lse


def backward_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    index: Tensor,
    divergence: Tensor,
    lse: Tensor,
    grad: Tensor,
    reverse: bool,
    temperature: float,
    softcap: float | None,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients by the first six arguments, each None unless `needs` asks for it."""
    vocab = weight.shape[0]
    plan = make_plan(index)
    operands = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    totals = [
        torch.zeros_like(t, dtype=statistics_dtype(t)) if need and t is not None else None
        for t, need in zip(operands, needs, strict=True)
    ]
    scaling = (temperature, softcap)
    sizes = chunk_sizes(plan.students.shape[0], plan.teachers.shape[0], vocab, hidden)
    teacher_body = maybe_compiled(log_probs, hidden.shape[0], vocab)
    body = maybe_compiled(gradient_of_chunk, hidden.shape[0], vocab)
    teacher_gradient = maybe_compiled(teacher_gradient_of_chunk, hidden.shape[0], vocab)
    for chunk in chunks(plan, *sizes):
        teachers = plan.teachers[chunk.teachers]
        rows = teacher_hidden[teachers]
        raw_teacher = product(rows, teacher_weight)
        teacher = teacher_body(raw_teacher, teacher_bias, *scaling)
        dt = torch.zeros_like(teacher) if any(needs[3:]) else None
        for part in chunk.students:
            students = plan.students[part]
            inputs = hidden[students]
            raw = product(inputs, weight)
            place = plan.place[part] - chunk.teachers.start
            row_values = (divergence[students], lse[students], grad[students], reverse)
            if dt is not None:
                dt.index_add_(
                    0, place, teacher_gradient(raw, bias, teacher, place, *row_values, *scaling)
                )
            if any(needs[:3]):
                ds = body(raw, bias, teacher, place, *row_values, *scaling)
                _add(totals[:3], ds.to(hidden.dtype), inputs, weight, students)
        if dt is not None:
            x = scale(raw_teacher, teacher_bias, softcap, temperature)
            dt = unscale(dt, x, softcap, temperature).to(teacher_hidden.dtype)
            _add(totals[3:], dt, rows, teacher_weight, teachers)
    return [t if t is None else t.to(o.dtype) for t, o in zip(totals, operands, strict=True)]  # type: ignore[union-attr]


def _add(
    totals: list[Tensor | None], dx: Tensor, inputs: Tensor, weight: Tensor, rows: Tensor
) -> None:
    """Adds what dx [S, V] by the raw products gives for hidden rows, weight and bias."""
    grad_hidden, grad_weight, grad_bias = totals
    if grad_hidden is not None:
        grad_hidden[rows] = torch.mm(dx, weight).to(grad_hidden.dtype)
    if grad_weight is not None:
        accumulate_weight(grad_weight, dx, inputs)
    if grad_bias is not None:
        grad_bias += dx.sum(0, dtype=grad_bias.dtype)
