"""Pairs of student and teacher rows, in an order that computes every teacher row once.

Student rows are sorted by their teacher row. A chunk is a range of distinct teacher rows together
with their students; k students of one teacher row then share its logits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_kernels.checks import check_document_and_mask
from mtp_kernels.targets import shifted_positions


class Plan(NamedTuple):
    """The order of work over R student and N teacher rows; S students meet U distinct teachers."""

    students: Tensor
    """[S] student rows sorted by teacher row; ignored rows are left out."""
    teachers: Tensor
    """[U] distinct teacher rows, ascending."""
    place: Tensor
    """[S] which of `teachers` each of `students` meets, ascending."""
    bounds: list[int]
    """[U + 1] the students of teachers a to b - 1 are students[bounds[a]:bounds[b]]."""


class Chunk(NamedTuple):
    """A range of teachers, and their students in pieces of bounded size."""

    teachers: slice
    students: list[slice]


def make_plan(index: Tensor) -> Plan:
    """The plan for index [R]: the teacher row of each student row, negative where there is none."""
    order = torch.argsort(index, stable=True)
    order = order[int((index < 0).sum()) :]
    teachers, place, counts = torch.unique_consecutive(
        index[order], return_inverse=True, return_counts=True
    )
    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).tolist()
    return Plan(order, teachers, place, bounds)


def chunks(plan: Plan, num_teachers: int, num_students: int) -> Iterator[Chunk]:
    """Chunks of at most num_teachers teacher rows, their students in pieces of num_students."""
    total = plan.teachers.shape[0]
    pieces = -(-total // num_teachers)
    size = -(-total // max(pieces, 1))
    for start in range(0, total, max(size, 1)):
        stop = min(start + size, total)
        first, last = plan.bounds[start], plan.bounds[stop]
        cuts = [*range(first, last, num_students), last]
        spans = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
        yield Chunk(slice(start, stop), spans)


def shifted_index(
    shape: tuple[int, int, int],
    shift: int,
    document: Tensor | None,
    mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """[B, T, K] flat teacher row of each student: t + shift - 1 + j for slot j at t, or -1."""
    batch, length, slots = shape
    check_document_and_mask(document, mask, (batch, length))
    position = shifted_positions(length, slots, shift - 1, device)
    inside = position < length
    clipped = position.clamp_max(max(length - 1, 0))
    valid = inside.expand(batch, -1, -1)
    if document is not None:
        valid = valid & (document[:, clipped] == document[:, :, None])
    if mask is not None:
        valid = valid & mask[:, clipped]
    start = length * torch.arange(batch, device=device)[:, None, None]
    return torch.where(valid, start + clipped, -1)
