"""An operand's layout changes no number, be it strided, offset, transposed or expanded.

Operands are derived from the public signatures. Hidden states and weights are multiples of 1/4, so
that products are exact in any order and ties are the same ones in every layout.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator

import mtp_kernels
import pytest
import torch
import torch.distributed as dist
from mtp_kernels import configs, parallel
from torch import Tensor

IMPLS = ("reference", "torch", "triton")
DESCRIBED = ("linear_logprob", "linear_loss", "linear_kl", "linear_logprob_parallel")
"""Ops of kernels that can read matrices through tensor descriptors."""
VOCAB, DEPTH, TEACHER_DEPTH = 25, 8, 12
ROWS = 7
SCALING = {"temperature": 0.8, "softcap": 5.0}


def public_ops() -> dict[str, Callable]:
    """Every public function of the package by name, vocabulary-parallel ones included."""
    found = [getattr(mtp_kernels, name) for name in mtp_kernels.__all__]
    found += [f for name, f in vars(parallel).items() if name.endswith("_parallel")]
    return {f.__name__: f for f in found if inspect.isfunction(f)}


def tensor_parameters(op: Callable) -> set[str]:
    """Names of the parameters that are or may be tensors."""
    hints = typing.get_type_hints(op)
    names = inspect.signature(op).parameters
    return {n for n in names if hints[n] is Tensor or Tensor in typing.get_args(hints[n])}


OPS = public_ops()


def matrix(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape) / 4


@functools.cache
def calls(op: str, rows: int = ROWS) -> tuple[dict[str, Tensor], ...]:
    """Contiguous operands of calls that together give an op every tensor it can take."""
    torch.manual_seed(2)
    batch, length, slots = 2, max(rows // 3, 1), 2
    weight, bias = matrix(VOCAB, DEPTH), torch.randn(VOCAB)
    flat = {"hidden": matrix(rows, DEPTH), "weight": weight}
    packed = {"hidden": matrix(batch, length, slots, DEPTH), "weight": weight}
    teacher = {"teacher_weight": matrix(VOCAB, TEACHER_DEPTH), "teacher_bias": torch.randn(VOCAB)}
    target = torch.randint(VOCAB, (rows,))
    target[1::4] = -100
    index = torch.randint(max(rows, 1), (rows,))
    index[1::4] = -1
    text = {
        "tokens": torch.randint(VOCAB, (batch, length)),
        "document": torch.randint(2, (batch, length)),
        "mask": torch.rand(batch, length) < 0.8,
    }
    noise = {"seed": torch.randint(2**62, (rows,)), "position": torch.randint(99, (rows,))}
    policy = {
        "advantage": torch.randn(rows),
        "old_logprob": -3 * torch.rand(rows),
        "row_weight": torch.rand(rows),
    }
    by_slot = {
        "slot_weight": torch.rand(slots) + 1,
        "slot_count": torch.randint(2, 9, (slots,)),
    }
    cases: dict[str, tuple[dict[str, Tensor], ...]] = {
        "shifted_targets": (text,),
        "linear_logprob": ({**flat, "target": target, "bias": bias}, {**packed, **text}),
        "linear_loss": (
            {**flat, "target": target, "bias": bias, **policy},
            {**packed, **text, **by_slot},
        ),
        "linear_kl": (
            {
                **flat, "bias": bias, **teacher, "index": index,
                "teacher_hidden": matrix(max(rows, 1), TEACHER_DEPTH),
            },
            {
                **packed, **teacher, "document": text["document"], "mask": text["mask"],
                "teacher_hidden": matrix(batch, length, TEACHER_DEPTH),
            },
        ),
        "linear_sample": ({**flat, "bias": bias, **noise},),
        "linear_verify": (
            {
                "hidden": matrix(rows, slots + 1, DEPTH), "weight": weight, "bias": bias,
                "draft": torch.randint(VOCAB, (rows, slots)), **noise,
                "draft_hidden": matrix(rows, slots, TEACHER_DEPTH),
                "draft_weight": matrix(VOCAB, TEACHER_DEPTH), "draft_bias": torch.randn(VOCAB),
            },
        ),
        "linear_logprob_parallel": ({**flat, "target": target, "bias": bias},),
        "linear_sample_parallel": ({**flat, "bias": bias, **noise},),
    }  # fmt: skip
    return cases[op]


def upstreams(op: str, number: int, rows: int = ROWS) -> dict[str, Tensor]:
    """Upstream gradients of a call's outputs, as operands named `grad of <output>`."""
    if op not in ("linear_logprob", "linear_kl", "linear_logprob_parallel"):
        return {}
    lead = calls(op, rows)[number]["hidden"].shape[:-1]
    names = ("kl",) if op == "linear_kl" else ("logprob", "lse", "entropy")
    torch.manual_seed(3)
    return {f"grad of {name}": torch.randn(lead) for name in names}


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
    """What the operand becomes in each layout, without those that are the same one in 1-D."""
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


def results(op: str, operands: dict[str, Tensor], impl: str) -> dict[str, Tensor | None]:
    """Outputs of an op, and gradients by every floating point operand."""
    operands = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in operands.items()}
    grads = {n: t.detach() for n, t in operands.items() if n.startswith("grad of ")}
    arguments: dict[str, object] = {n: t for n, t in operands.items() if n not in grads}
    if op == "shifted_targets":
        return {"target": OPS[op](**arguments, num_slots=3)}
    if op.endswith("_parallel"):
        arguments["start"] = 0
    if op == "linear_loss":
        arguments["z_loss"] = 1e-2
    out = OPS[op](**arguments, impl=impl, **SCALING)
    values = {name: value.detach() for name, value in out._asdict().items()}
    roots = {name: value for name, value in out._asdict().items() if value.requires_grad}
    if roots:
        leaves = {n: t for n, t in arguments.items() if isinstance(t, Tensor) and t.requires_grad}
        upstream = [grads.get(f"grad of {name}") for name in roots]
        found = torch.autograd.grad(
            list(roots.values()), list(leaves.values()), upstream, allow_unused=True
        )
        values |= {f"gradient by {n}": g for n, g in zip(leaves, found, strict=True)}
    return values


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory) -> Iterator[None]:
    """A group of one rank, for the vocabulary-parallel ops."""
    folder = tmp_path_factory.mktemp("rendezvous")
    dist.init_process_group("gloo", init_method=f"file://{folder}/file", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


CASES = [
    (op, number, name)
    for op in OPS
    for number, operands in enumerate(calls(op))
    for name in (*operands, *upstreams(op, number))
]


@pytest.mark.parametrize("op", OPS)
def test_every_tensor_that_an_op_takes_is_an_operand_here(op):
    assert set().union(*calls(op)) == tensor_parameters(OPS[op])


@pytest.mark.usefixtures("chunked")
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


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", [op for op in OPS if op != "shifted_targets"])
def test_no_rows_and_one_row(op, impl, rows):
    for number, call in enumerate(calls(op, rows)):
        operands = {**call, **upstreams(op, number, rows)}
        expected = results(op, operands, "reference")
        got = results(op, {name: strided(t) for name, t in operands.items()}, impl)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("chunked")
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
