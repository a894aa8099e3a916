"""`linear_kl` in chunks of teacher rows, each of which is made once for all of its students.

With p the teacher, q the student, and t, s their scaled logits:

    forward KL(p || q) = sum p (log p - log q)    ds = q - p    dt = p (log p - log q - KL)
    reverse KL(q || p) = sum q (log q - log p)    dt = p - q    ds = q (log q - log p - KL)
"""

import torch
from torch import Tensor

from mtp_kernels.dispatch import maybe_compiled, rows_per_chunk, statistics_dtype
from mtp_kernels.linear_kl.plan import chunks, make_plan
from mtp_kernels.linear_kl.problem import Problem
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
    # From the largest logit: lse is rounded to its last digit, which log_q need not be.
    largest = x.amax(-1, keepdim=True)
    x = x - largest
    log_total = x.exp().sum(-1).log()
    log_q = (x - log_total[:, None]).clamp_min(NEGATIVE)
    lse = largest[:, 0] + log_total
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
    of_teacher: bool,
    reverse: bool,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """[S, V] gradient by the students' raw products, in their dtype.

    With of_teacher: each student's part of the gradient by its teacher's scaled logits.
    """
    x = scale(raw, bias, softcap, temperature)
    log_q = (x - lse[:, None]).clamp_min(NEGATIVE)
    log_p = teacher[place]
    if of_teacher != reverse:
        # The gradient by the logits of what the expectation is over.
        ours, other = (log_p, log_q) if of_teacher else (log_q, log_p)
        dx = ours.exp() * (ours - other - divergence[:, None])
    else:
        dx = log_p.exp() - log_q.exp() if of_teacher else log_q.exp() - log_p.exp()
    dx = dx * grad[:, None]
    return dx if of_teacher else unscale(dx, x, softcap, temperature).to(raw.dtype)


def chunk_sizes(students: int, teachers: int, vocab: int, operand: Tensor) -> tuple[int, int]:
    """(teacher rows, student rows) whose logits are in memory at once."""
    return (
        rows_per_chunk(max(teachers, 1), vocab, operand, buffers=2, tall=True),
        rows_per_chunk(max(students, 1), vocab, operand, buffers=2, tall=True),
    )


def divergence_torch(problem: Problem) -> tuple[Tensor, Tensor]:
    """([R] divergences, [R] the students' lse), 0 where the index is negative."""
    hidden, weight, bias = problem.student
    teacher_hidden, teacher_weight, teacher_bias = problem.teacher
    rows, vocab = hidden.shape[0], weight.shape[0]
    plan = make_plan(problem.index)
    out = hidden.new_zeros(rows, dtype=statistics_dtype(hidden))
    lse = torch.zeros_like(out)
    settings = (problem.reverse, *problem.scaling)
    sizes = chunk_sizes(plan.students.shape[0], plan.teachers.shape[0], vocab, hidden)
    teacher_body = maybe_compiled(log_probs, rows, vocab)
    body = maybe_compiled(divergence_of_chunk, rows, vocab)
    for chunk in chunks(plan, *sizes):
        inputs = teacher_hidden[plan.teachers[chunk.teachers]]
        teacher = teacher_body(product(inputs, teacher_weight), teacher_bias, *problem.scaling)
        for part in chunk.students:
            students = plan.students[part]
            raw = product(hidden[students], weight)
            place = plan.place[part] - chunk.teachers.start
            out[students], lse[students] = body(raw, bias, teacher, place, *settings)
    return out, lse


def backward_torch(
    problem: Problem, divergence: Tensor, lse: Tensor, grad: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients by the student's and the teacher's hidden, weight and bias where `needs` asks."""
    hidden, weight, bias = problem.student
    teacher_hidden, teacher_weight, teacher_bias = problem.teacher
    rows, vocab = hidden.shape[0], weight.shape[0]
    plan = make_plan(problem.index)
    operands = (*problem.student, *problem.teacher)
    totals = [
        t.new_zeros(t.shape, dtype=statistics_dtype(t)) if need and t is not None else None
        for t, need in zip(operands, needs, strict=True)
    ]
    sizes = chunk_sizes(plan.students.shape[0], plan.teachers.shape[0], vocab, hidden)
    teacher_body = maybe_compiled(log_probs, rows, vocab)
    body = maybe_compiled(gradient_of_chunk, rows, vocab)
    for chunk in chunks(plan, *sizes):
        teachers = plan.teachers[chunk.teachers]
        teacher_inputs = teacher_hidden[teachers]
        raw_teacher = product(teacher_inputs, teacher_weight)
        teacher = teacher_body(raw_teacher, teacher_bias, *problem.scaling)
        dt = torch.zeros_like(teacher) if any(needs[3:]) else None
        for part in chunk.students:
            students = plan.students[part]
            inputs = hidden[students]
            raw = product(inputs, weight)
            place = plan.place[part] - chunk.teachers.start
            pairs = (raw, bias, teacher, place, divergence[students], lse[students], grad[students])
            settings = (problem.reverse, *problem.scaling)
            if dt is not None:
                dt.index_add_(0, place, body(*pairs, True, *settings).to(dt.dtype))
            if any(needs[:3]):
                ds = body(*pairs, False, *settings)
                _add(totals[:3], ds.to(hidden.dtype), inputs, weight, students)
        if dt is not None:
            x = scale(raw_teacher, teacher_bias, problem.softcap, problem.temperature)
            dt = unscale(dt, x, problem.softcap, problem.temperature).to(teacher_hidden.dtype)
            _add(totals[3:], dt, teacher_inputs, teacher_weight, teachers)
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
