"""Calls of every public op with every tensor it can take, derived from the public signatures.

Hidden states and weights are multiples of 1/4: products are exact in any order, so that ties are
the same ones whatever the layout and the implementation.
"""

import functools
import inspect
import typing
from collections.abc import Callable

import mtp_kernels
import torch
from mtp_kernels import parallel
from torch import Tensor

IMPLS = ("reference", "torch", "triton")
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


def results(
    op: str, operands: dict[str, Tensor], impl: str, **settings: object
) -> dict[str, Tensor | None]:
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
    out = OPS[op](**arguments, impl=impl, **{**SCALING, **settings})
    values = {name: value.detach() for name, value in out._asdict().items()}
    roots = {name: value for name, value in out._asdict().items() if value.requires_grad}
    if roots:
        leaves = {n: t for n, t in arguments.items() if isinstance(t, Tensor) and t.requires_grad}
        upstream = [grads.get(f"grad of {name}", torch.ones_like(v)) for name, v in roots.items()]
        found = torch.autograd.grad(
            list(roots.values()), list(leaves.values()), upstream, allow_unused=True
        )
        values |= {f"gradient by {n}": g for n, g in zip(leaves, found, strict=True)}
    return values
