"""Requirements of every op: reproducible bits, no trace of tile sizes, nothing unwritten, no
breaks.
"""

import dataclasses

import pytest
import torch
from kernel_cases import assert_as_good, counts_bytes, operands, plain_logits
from mtp_kernels import (
    configs,
    dispatch,
    linear_kl,
    linear_logprob,
    linear_loss,
    linear_sample,
    linear_verify,
)
from torch import Tensor

PATHS = ("torch", "triton")
DIFFERENTIABLE = ("linear_logprob", "linear_loss", "linear_kl")
OPS = (*DIFFERENTIABLE, "linear_sample", "linear_verify")


def outputs(op: str, hidden: Tensor, weight: Tensor, impl: str, masked: bool = False):
    """Result of an op for hidden [R, D], all else made of R and V; every fourth row ignored."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    row = torch.arange(rows)
    ignored = (row % 4 == 3) | masked
    target = torch.where(ignored, -100, row * 7 % vocab)
    teacher = hidden.detach().nan_to_num().flip(0)
    if op == "linear_logprob":
        return linear_logprob(hidden, weight, target, impl=impl)
    if op == "linear_loss":
        return linear_loss(hidden, weight, target, row_weight=(row + 1) / rows, impl=impl)
    if op == "linear_kl":
        index = torch.where(ignored, -1, row // 3)
        return linear_kl(hidden, weight, teacher, index=index, impl=impl)
    if op == "linear_sample":
        return linear_sample(hidden, weight, seed=3, position=row, impl=impl)
    num = rows // 4
    main, head = hidden[: 4 * num].unflatten(0, (num, 4)), teacher[: 3 * num].unflatten(0, (num, 3))
    draft = (torch.arange(3 * num) * 5 % vocab).view(num, 3)
    return linear_verify(main, weight, draft, head, seed=3, position=10 * row[:num], impl=impl)


def all_results(op: str, impl: str, rows: int = 37, vocab: int = 101) -> list[Tensor]:
    """Every output of an op at odd sizes, and the gradients by hidden and weight."""
    torch.manual_seed(5)
    hidden, weight = operands((rows,), vocab, 24, torch.float32)
    values = list(outputs(op, hidden, weight, impl))
    if op not in DIFFERENTIABLE:
        return values
    upstream = torch.linspace(-1, 2, values[0].numel()).view_as(values[0])
    return [*values, *torch.autograd.grad((values[0] * upstream).sum(), (hidden, weight))]


def test_memory_that_is_not_written_to_holds_nan_in_these_tests():
    assert torch.empty(3).isnan().all()
    assert torch.zeros(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_in_every_run(op, impl):
    for first, second in zip(all_results(op, impl), all_results(op, impl), strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("tile", [(16, 128, 32), (64, 16, 8)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_triton_result_does_not_depend_on_its_tile(op, tile, monkeypatch):
    before = all_results(op, "triton")
    rows, vocab, depth = tile
    other = dataclasses.replace(configs.INTERPRET, rows=rows, vocab=vocab, depth=max(16, depth))
    monkeypatch.setattr(configs, "INTERPRET", other)
    torch.testing.assert_close(all_results(op, "triton"), before, atol=1e-5, rtol=1e-5)


@counts_bytes
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_operands_read_through_descriptors_give_the_same(op, monkeypatch):
    before = all_results(op, "triton")
    described = dataclasses.replace(configs.INTERPRET, described=True)
    monkeypatch.setattr(configs, "INTERPRET", described)
    torch.testing.assert_close(all_results(op, "triton"), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth, dtype", [(24, torch.bfloat16), (20, torch.bfloat16)])
def test_only_rows_at_multiples_of_16_bytes_are_described(depth, dtype):
    assert configs.describable(torch.zeros(3, depth, dtype=dtype)) == (depth % 8 == 0)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("size", [1000, 20_000, 1 << 24])
@pytest.mark.parametrize("op", OPS)
def test_a_torch_result_does_not_depend_on_its_chunks(op, size, monkeypatch):
    before = all_results(op, "torch")
    for name in ("CHUNK_BYTES", "CHUNK_BYTES_TALL"):
        monkeypatch.setattr(dispatch, name, size)
    torch.testing.assert_close(all_results(op, "torch"), before, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", ["reference", *PATHS])
@pytest.mark.parametrize("op", OPS)
def test_moving_all_logits_by_300_nats_changes_no_probability(op, impl):
    """A constant in all logits of a row cancels in each probability, whatever its sign."""
    hidden, weight = (t.detach() for t in operands((13,), 101, 8, torch.float32))
    hidden[:, 0] = 1.0
    weight[:, 0] = 0.0
    expected = outputs(op, hidden, weight, impl)
    for constant in (-300.0, 300.0):
        weight[:, 0] = constant
        moved = outputs(op, hidden, weight, impl)
        for name, got in moved._asdict().items():
            value = getattr(expected, name)
            if name == "lse":
                value = torch.where(value == 0, 0.0, value + constant)
            torch.testing.assert_close(got, value, atol=2e-4, rtol=2e-4)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", ["reference", *PATHS])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_rows_without_a_target_give_zeros_and_no_gradient(op, impl):
    hidden, weight = operands((5,), 33, 8, torch.float32)
    values = outputs(op, hidden, weight, impl, masked=True)
    for name, value in values._asdict().items():
        assert (value == (-1 if name == "argmax" else 0)).all(), name
    grads = torch.autograd.grad(values[0].sum(), (hidden, weight))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("impl", ["reference", "auto", *PATHS])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_nothing_in_an_ignored_row_reaches_a_result(op, impl, monkeypatch):
    """NaN in every fourth row changes no output and no gradient; "auto" is plain PyTorch here."""
    if impl != "auto":
        monkeypatch.setattr(dispatch, "DIRECT_NUMEL", 0)
    results = []
    for filling in (0.0, torch.nan):
        torch.manual_seed(5)
        hidden, weight = (t.detach() for t in operands((8,), 33, 8, torch.float32))
        hidden[3::4] = filling
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        values = outputs(op, *leaves, impl)
        results.append([*values, *torch.autograd.grad(values[0].sum(), leaves)])
    for clean, filled in zip(*results, strict=True):
        assert torch.equal(clean, filled)


@pytest.mark.parametrize("direct", [True, False], ids=["plain PyTorch", "chunked"])
def test_a_teacher_row_that_no_student_meets_reaches_no_gradient(direct, monkeypatch):
    monkeypatch.setattr(dispatch, "DIRECT_NUMEL", dispatch.DIRECT_NUMEL if direct else 0)
    hidden, weight = operands((3,), 33, 8, torch.float32)
    teacher, teacher_weight = operands((3,), 33, 8, torch.float32)
    teacher = teacher.detach().index_fill(0, torch.tensor(0), torch.nan).requires_grad_()
    index = torch.tensor([1, -1, 2])
    leaves = (hidden, weight, teacher, teacher_weight)
    kl = linear_kl(*leaves, index=index).kl
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(kl.sum(), leaves))


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_breaks(op):
    hidden, weight = operands((9,), 33, 8, torch.float32)

    def call(h: Tensor, w: Tensor) -> list[Tensor]:
        return list(outputs(op, h, w, "torch"))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(hidden, weight), call(hidden, weight)
    torch.testing.assert_close(ours, eager)
    if op in DIFFERENTIABLE:
        ours = torch.autograd.grad(ours[0].sum(), (hidden, weight))
        eager = torch.autograd.grad(eager[0].sum(), (hidden, weight))
        torch.testing.assert_close(ours, eager)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("op", [*DIFFERENTIABLE, "linear_sample", "linear_verify_residual"])
def test_operators_are_registered_as_torch_asks(op, transposed):
    """Fake tensors, their strides included, gradients, and that no argument is written to."""
    hidden, weight = operands((5,), 33, 8, torch.float32)
    if transposed:
        hidden, weight = (t.detach().T.contiguous().T.requires_grad_() for t in (hidden, weight))
    fixed_hidden, fixed_weight = hidden.detach(), weight.detach()
    target, row, lse = torch.tensor([0, 32, -100, 5, 5]), torch.arange(5), torch.full((5,), 9.0)
    operand, fixed, scaling = (hidden, weight, None), (fixed_hidden, fixed_weight, None), (0.7, 5.0)
    policy = (lse / 9, lse / 9, -lse / 3, 0.2, 0.2, 1e-3)
    arguments = {
        "linear_logprob": (*operand, target, *scaling, -100, "torch"),
        "linear_loss": (*operand, target, *policy, *scaling, -100, "torch", [True, True, False]),
        "linear_kl": (*operand, *fixed, torch.tensor([0, 1, -1, 4, 1]), False, *scaling, "torch"),
        "linear_sample": (*fixed, row, row, *scaling, "torch"),
        "linear_verify_residual": (
            *fixed,
            lse,
            *fixed,
            lse,
            row > 2,
            row,
            row,
            *scaling,
            "torch",
        ),  # fmt: skip
    }
    operator = getattr(torch.ops.mtp_kernels, op).default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if op != "linear_loss":  # whose gradients are outputs: see docs/kernels.md
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments[op], test_utils=checks)


def plain(op: str, hidden: Tensor, weight: Tensor) -> Tensor:
    """The first output of an op by plain code in the operands' dtype."""
    rows = torch.arange(hidden.shape[0])
    target, kept = rows * 7 % weight.shape[0], rows % 4 != 3
    log_q = plain_logits(hidden, weight).log_softmax(-1)
    if op == "linear_kl":
        teacher = hidden.detach().flip(0)[rows // 3]
        log_p = plain_logits(teacher, weight.detach()).log_softmax(-1)
        return torch.where(kept, (log_p.exp() * (log_p - log_q)).sum(-1), 0.0)
    logprob = torch.where(kept, log_q.gather(-1, target[:, None])[:, 0], 0.0)
    if op == "linear_loss":
        return -(logprob * (rows + 1) / len(rows)).sum()
    return logprob


@pytest.mark.parametrize("vocab", [49_152, 151_936])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_real_vocabularies_in_bfloat16(op, vocab):
    """Value and gradients in the dtype that is trained, against plain code in the same dtype."""
    sizes = ((24,), vocab, 64)
    results = {}
    for name, dtype in (
        ("truth", torch.float64),
        ("plain", torch.bfloat16),
        ("op", torch.bfloat16),
    ):
        torch.manual_seed(5)
        hidden, weight = ((t.detach() * 0.25).requires_grad_() for t in operands(*sizes, dtype))
        value = (
            outputs(op, hidden, weight, "torch")[0] if name == "op" else plain(op, hidden, weight)
        )
        results[name] = [value, *torch.autograd.grad(value.sum(), (hidden, weight))]
    assert_as_good(results["op"], results["plain"], results["truth"])
