"""`linear_kl` in Triton: teacher logits once per chunk, then one pass over the students.

A chunk's distinct teacher rows are made once, in float32, with their log-sum-exp; the students'
kernel makes its own logits tile by tile, reads the teacher's beside them through an index, and
keeps running sums. With p the teacher, q the student, t, s their scaled logits and m the largest s:

    forward   A = sum p (log p - s + m),          P = sum p      KL = A / P + log Z
    reverse   B = sum exp(s - m) (s - m - log p)                 KL = B / Z - log Z

All terms are as small as the divergence is, whatever the logits are. P is 1 but for the rounding of
the teacher's lse, which puts all p off by one factor.

Keeping the teacher's tile in registers beside the student's would save the buffer, at the price of
a teacher tile per slot in registers; the buffer also serves any index, not only a shift.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_kernels.configs import config_for, split_grid
from mtp_kernels.dispatch import rows_per_chunk
from mtp_kernels.linear_kl.plan import Plan, chunks, make_plan
from mtp_kernels.linear_kl.problem import Problem
from mtp_kernels.linear_logprob.triton import stats_triton
from mtp_kernels.logits import accumulate_weight
from mtp_kernels.rowstats import finish
from mtp_kernels.tiles import (
    NEG,
    VARYING,
    aligned,
    check_triton,
    launch,
    logits_tile,
    operand_arguments,
    scaling_options,
    tile_options,
    unscale_tile,
)


@triton.jit(do_not_specialize=VARYING)
def kl_stats_kernel(
    hidden,
    weight,
    bias,
    teacher,
    teacher_lse,
    place,
    floats,
    num_rows,
    vocab,
    depth,
    tiles_per_split,
    softcap,
    inverse_temperature,
    REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    T: tl.constexpr,
):
    """Floats [splits, 4, R] = m, Z, A or B, P, for teacher logits [U, V] at rows place [R]."""
    BR: tl.constexpr = T.rows
    BV: tl.constexpr = T.vocab
    split = tl.program_id(1).to(tl.int64)
    row_start = tl.program_id(0) * BR
    rows = row_start + tl.arange(0, BR)
    row_inside = rows < num_rows
    safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    teacher_row = tl.load(place + safe_rows).to(tl.int32)  # a chunk has less than 2**31 logits
    t_lse = tl.load(teacher_lse + teacher_row)
    m = tl.full((BR,), NEG, tl.float32)
    z = tl.zeros((BR,), tl.float32)
    gap = tl.zeros((BR,), tl.float32)
    mass = tl.zeros((BR,), tl.float32)
    first = tl.program_id(1) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(vocab, BV))
    for tile in tl.range(first, last, flatten=T.described):
        ids = tile * BV + tl.arange(0, BV)
        inside = ids < vocab
        s = logits_tile(
            hidden, weight, bias, row_start, tile * BV, num_rows, vocab, depth,
            softcap, inverse_temperature, False, HAS_BIAS, HAS_SOFTCAP, T,
        )  # fmt: skip
        s = tl.where(inside[None, :], s, NEG)
        t = tl.load(
            teacher + teacher_row[:, None] * vocab + ids[None, :], mask=inside[None, :], other=NEG
        )
        new_m = tl.maximum(m, tl.max(s, 1))
        change = m - new_m
        fade = tl.exp(change)
        relative = s - new_m[:, None]
        log_p = t - t_lse[:, None]
        e = tl.exp(relative)
        if REVERSE:
            gap = fade * (gap + change * z) + tl.sum(e * (relative - log_p), 1)
        else:
            p = tl.exp(log_p)
            gap += tl.sum(p * (log_p - relative), 1) - change * mass
            mass += tl.sum(p, 1)
        z = fade * z + tl.sum(e, 1)
        m = new_m
    out = floats + split * 4 * num_rows + safe_rows
    tl.store(out, m, mask=row_inside)
    tl.store(out + num_rows, z, mask=row_inside)
    tl.store(out + 2 * num_rows, gap, mask=row_inside)
    tl.store(out + 3 * num_rows, mass, mask=row_inside)


@triton.jit(do_not_specialize=VARYING)
def kl_gradient_kernel(
    hidden,
    weight,
    bias,
    teacher,
    teacher_lse,
    place,
    values,
    out,
    num_rows,
    vocab,
    depth,
    softcap,
    inverse_temperature,
    REVERSE: tl.constexpr,
    OF_TEACHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    T: tl.constexpr,
):
    """Out [R, V] by the student's products, or its part of the teacher's where OF_TEACHER.

    values [3, R] = KL, lse of the student, upstream gradient.
    """
    BR: tl.constexpr = T.rows
    BV: tl.constexpr = T.vocab
    row_start = tl.program_id(0) * BR
    rows = row_start + tl.arange(0, BR)
    safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    id_start = tl.program_id(1) * BV
    ids = id_start + tl.arange(0, BV)
    inside = ids < vocab
    s = logits_tile(
        hidden, weight, bias, row_start, id_start, num_rows, vocab, depth,
        softcap, inverse_temperature, False, HAS_BIAS, HAS_SOFTCAP, T,
    )  # fmt: skip
    teacher_row = tl.load(place + safe_rows).to(tl.int32)  # a chunk has less than 2**31 logits
    t = tl.load(
        teacher + teacher_row[:, None] * vocab + ids[None, :], mask=inside[None, :], other=0.0
    )
    log_p = t - tl.load(teacher_lse + teacher_row)[:, None]
    kl = tl.load(values + safe_rows)[:, None]
    log_q = s - tl.load(values + num_rows + safe_rows)[:, None]
    grad = tl.load(values + 2 * num_rows + safe_rows)[:, None]
    if OF_TEACHER:
        p = tl.exp(log_p)
        dx = p - tl.exp(log_q) if REVERSE else p * (log_p - log_q - kl)
        dx = unscale_tile(dx * grad, t, softcap, inverse_temperature, HAS_SOFTCAP)
    else:
        q = tl.exp(log_q)
        dx = q * (log_q - log_p - kl) if REVERSE else q - tl.exp(log_p)
        dx = unscale_tile(dx * grad, s, softcap, inverse_temperature, HAS_SOFTCAP)
    row_inside = rows < num_rows
    place_out = safe_rows[:, None] * vocab + ids[None, :]
    mask = row_inside[:, None] & inside[None, :]
    tl.store(out + place_out, dx.to(out.dtype.element_ty), mask=mask)


def divergence_triton(problem: Problem) -> tuple[Tensor, Tensor]:
    """([R] divergences, [R] the students' lse), 0 where the index is negative."""
    check_triton(*problem.student, *problem.teacher)
    hidden, weight, bias = problem.student
    hidden, weight = aligned(hidden), aligned(weight)
    vocab = weight.shape[0]
    config = config_for("kl_stats", hidden, weight)
    plan = make_plan(problem.index)
    out, lse = hidden.new_zeros((2, hidden.shape[0]), dtype=torch.float32).unbind()
    for chunk in chunks(plan, _teacher_rows(plan, vocab, hidden), max(hidden.shape[0], 1)):
        teacher, teacher_lse = _teacher_chunk(plan, chunk.teachers, problem)
        for part in chunk.students:
            students = plan.students[part]
            inputs, count = hidden[students], students.shape[0]
            row_tiles, splits, per_split = split_grid(count, vocab, config, hidden.device)
            floats = torch.empty((splits, 4, count), dtype=torch.float32, device=hidden.device)
            place = plan.place[part] - chunk.teachers.start
            launch(
                kl_stats_kernel,
                (row_tiles, splits),
                (
                    *operand_arguments(config, inputs, weight),
                    inputs if bias is None else bias,
                    teacher,
                    teacher_lse,
                    place,
                ),
                (floats,),
                count,
                vocab,
                hidden.shape[1],
                per_split,
                REVERSE=problem.reverse,
                **scaling_options(bias, *problem.scaling),
                **tile_options(config, hidden),
            )
            out[students], lse[students] = _finish(floats, problem.reverse)
    return out.clone(), lse.clone()


def _teacher_rows(plan: Plan, vocab: int, hidden: Tensor, tall: bool = False) -> int:
    return rows_per_chunk(max(plan.teachers.shape[0], 1), vocab, hidden, tall=tall)


def _teacher_chunk(plan: Plan, part: slice, problem: Problem) -> tuple[Tensor, Tensor]:
    """([U, V] scaled logits in float32, [U] log-sum-exp) of a chunk's teacher rows."""
    hidden, weight, bias = problem.teacher
    rows = hidden[plan.teachers[part]]
    logits = rows.new_empty((rows.shape[0], weight.shape[0]), dtype=torch.float32)
    nothing = torch.full((rows.shape[0],), -1, dtype=torch.int64, device=rows.device)
    stats = stats_triton(rows, weight, bias, nothing, *problem.scaling, logits=logits)
    return logits, finish(stats)[1]


def _finish(floats: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """(divergence, lse of the student), each [R], of the parts [splits, 4, R], in their order."""
    maximum, total, gap, mass = floats.unbind(1)
    largest = maximum.amax(0)
    change = maximum - largest
    fade = change.exp()
    z = (fade * total).sum(0)
    log_z = z.log()
    if reverse:
        divergence = (fade * (gap + change * total)).sum(0) / z - log_z
    else:
        divergence = (gap - change * mass).sum(0) / mass.sum(0) + log_z
    return divergence, largest + log_z


def backward_triton(
    problem: Problem, divergence: Tensor, lse: Tensor, grad: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients by the student's and the teacher's hidden, weight and bias where `needs` asks."""
    problem = problem.contiguous()
    hidden, weight, _ = problem.student
    teacher_hidden, teacher_weight, _ = problem.teacher
    plan = make_plan(problem.index)
    operands = (*problem.student, *problem.teacher)
    totals = [
        t.new_zeros(t.shape, dtype=torch.float32) if need and t is not None else None
        for t, need in zip(operands, needs, strict=True)
    ]
    size = _teacher_rows(plan, weight.shape[0], hidden, tall=needs[1] or needs[4])
    for chunk in chunks(plan, size, size):
        teacher_values = _teacher_chunk(plan, chunk.teachers, problem)
        for part in chunk.students:
            students = plan.students[part]
            place = plan.place[part] - chunk.teachers.start
            values = torch.stack((divergence[students], lse[students], grad[students])).float()
            inputs = hidden[students]
            pairs = (problem, inputs, *teacher_values, place, values)
            if any(needs[:3]):
                _add(totals[:3], _logit_gradient(*pairs, False), inputs, weight, students)
            if any(needs[3:]):
                meets = plan.teachers[plan.place[part]]
                dt = _logit_gradient(*pairs, True)
                _add(totals[3:], dt, teacher_hidden[meets], teacher_weight, meets)
    return [
        None if t is None or o is None else t.to(o.dtype)
        for t, o in zip(totals, operands, strict=True)
    ]


def _logit_gradient(
    problem: Problem,
    inputs: Tensor,
    teacher: Tensor,
    teacher_lse: Tensor,
    place: Tensor,
    values: Tensor,
    of_teacher: bool,
) -> Tensor:
    """[S, V] gradient by the products of the students, or of the teachers they meet."""
    _, weight, bias = problem.student
    inputs, weight = aligned(inputs), aligned(weight)
    config = config_for("kl_gradient", inputs, weight)
    count, vocab = inputs.shape[0], weight.shape[0]
    dtype = problem.teacher.hidden.dtype if of_teacher else inputs.dtype
    out = inputs.new_empty((count, vocab), dtype=dtype)
    launch(
        kl_gradient_kernel,
        (triton.cdiv(count, config.rows), triton.cdiv(vocab, config.vocab)),
        (
            *operand_arguments(config, inputs, weight),
            inputs if bias is None else bias,
            teacher,
            teacher_lse,
            place,
            values,
        ),
        (out,),
        count,
        vocab,
        inputs.shape[1],
        REVERSE=problem.reverse,
        OF_TEACHER=of_teacher,
        **scaling_options(bias, *problem.scaling),
        **tile_options(config, inputs),
    )
    return out


def _add(
    totals: list[Tensor | None], dx: Tensor, inputs: Tensor, weight: Tensor, rows: Tensor
) -> None:
    """Adds what dx [S, V] gives for hidden rows, weight and bias; rows ascend and may repeat."""
    grad_hidden, grad_weight, grad_bias = totals
    if grad_hidden is not None and rows.shape[0]:
        # Sums of runs by differences would cancel; a loop over repeats keeps the order fixed.
        parts = torch.mm(dx, weight).float()
        distinct, counts = torch.unique_consecutive(rows, return_counts=True)
        start = counts.cumsum(0) - counts
        for repeat in range(int(counts.max())):
            has = counts > repeat
            grad_hidden[distinct[has]] += parts[start[has] + repeat]
    if grad_weight is not None:
        accumulate_weight(grad_weight, dx, inputs)
    if grad_bias is not None:
        grad_bias += dx.sum(0, dtype=torch.float32)
