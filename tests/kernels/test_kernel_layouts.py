"""An operand's layout changes no number, be it strided, offset, transposed or expanded."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from kernel_calls import IMPLS, OPS, calls, results, tensor_parameters, upstreams
from kernel_cases import counts_bytes
from mtp_kernels import configs
from torch import Tensor

pytestmark = pytest.mark.usefixtures("chunked", "one_rank")
DESCRIBED = ("linear_logprob", "linear_loss", "linear_kl", "linear_logprob_parallel")
"""Ops of kernels that can read matrices through tensor descriptors."""


def surrounded(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory of other values that the operand is placed in."""
    if x.dtype == torch.bool:
        return torch.arange(torch.Size(shape).numel()).view(shape) % 3 == 0
    return torch.full(shape, 1e3 if x.is_floating_point() else 1, dtype=x.dtype)


def strided(x: Tensor) -> Tensor:
    memory = surrounded(x, (*x.shape, 2))
    memory[..., 0] = x
    return memory[..., 0]


def offset(x: Tensor) -> Tensor:
    memory = surrounded(x, (x.numel() + 1,))
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The operand in each layout, without those that are the same one in 1-D."""
    changed = {name: change(x) for name, change in LAYOUTS.items()}
    distinct = {(t.stride(), t.storage_offset()): name for name, t in reversed(changed.items())}
    distinct.pop((x.stride(), 0), None)
    return {name: changed[name] for name in distinct.values()}


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": strided,
    "offset": offset,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
}


CASES = [
    (op, number, name)
    for op in OPS
    for number, operands in enumerate(calls(op))
    for name in (*operands, *upstreams(op, number))
]


@pytest.mark.parametrize("op", OPS)
def test_every_tensor_that_an_op_takes_is_an_operand_here(op):
    assert set().union(*calls(op)) == tensor_parameters(OPS[op])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op, number, name", CASES, ids=lambda value: str(value))
def test_a_layout_changes_no_number(op, number, name, impl):
    operands = {**calls(op)[number], **upstreams(op, number)}
    for layout, changed in layouts(operands[name]).items():
        expected = results(op, {**operands, name: changed.clone().contiguous()}, "reference")
        got = results(op, {**operands, name: changed}, impl)
        torch.testing.assert_close(
            got, expected, atol=2e-5, rtol=1e-5, msg=lambda m, layout=layout: f"{layout}: {m}"
        )


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", [op for op in OPS if op != "shifted_targets"])
def test_no_rows_and_one_row(op, impl, rows):
    for number, call in enumerate(calls(op, rows)):
        operands = {**call, **upstreams(op, number, rows)}
        expected = results(op, operands, "reference")
        got = results(op, {name: strided(t) for name, t in operands.items()}, impl)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@counts_bytes
@pytest.mark.parametrize("op", DESCRIBED)
@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_a_layout_changes_no_number_that_is_read_through_descriptors(op, layout, monkeypatch):
    described = dataclasses.replace(configs.INTERPRET, described=True)
    monkeypatch.setattr(configs, "INTERPRET", described)
    operands = {name: LAYOUTS[layout](t) for name, t in calls(op)[0].items()}
    operands |= upstreams(op, 0)
    dense = {name: t.clone().contiguous() for name, t in operands.items()}
    expected = results(op, dense, "reference")
    torch.testing.assert_close(results(op, operands, "triton"), expected, atol=2e-5, rtol=1e-5)
