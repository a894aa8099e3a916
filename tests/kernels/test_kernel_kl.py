"""`linear_kl`: divergences and gradients of every path, and who meets which teacher row."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import SCALINGS, assert_as_good, operands, plain_logits
from mtp_kernels import linear_kl
from mtp_kernels.linear_kl.plan import chunks, make_plan
from torch import Tensor

PATHS = ("torch", "triton")


def plain_kl(student, teacher, index, direction, **scaling) -> Tensor:
    log_q = plain_logits(*student, **scaling).log_softmax(-1)
    log_p = plain_logits(*teacher, **scaling).log_softmax(-1)[index.clamp_min(0)]
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    return torch.where(index >= 0, (log_p.exp() * (log_p - log_q)).sum(-1), 0.0)


def run(impl, dtype, index, num_teachers, vocab, depths, bias, direction, scaling):
    torch.manual_seed(3)
    student = operands(index.shape, vocab, depths[0], dtype, bias)
    teacher = operands((num_teachers,), vocab, depths[1], dtype, bias)
    if impl == "plain":
        kl = plain_kl(student, teacher, index, direction, **scaling)
    else:
        biases = {"bias": student[2], "teacher_bias": teacher[2]} if bias else {}
        kl = linear_kl(
            *student[:2],
            *teacher[:2],
            index=index,
            direction=direction,
            impl=impl,
            **biases,
            **scaling,
        ).kl
    weights = torch.linspace(-1, 2, kl.numel()).to(kl.dtype)
    return [kl, *torch.autograd.grad((kl * weights).sum(), [*student, *teacher])]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", ["plain", "both"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("impl", PATHS)
def test_values_and_gradients_are_as_good_as_plain_code(impl, direction, scaling, dtype):
    index = torch.randint(-1, 11, (37,))
    case = (index, 11, 101, (24, 20), scaling == "both", direction, SCALINGS[scaling])
    truth = run("reference", torch.float64, *case)
    assert_as_good(run(impl, dtype, *case), run("plain", dtype, *case), truth)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 30),
    teachers=st.integers(1, 20),
    vocab=st.integers(2, 70),
    direction=st.sampled_from(["forward", "reverse"]),
)
@example(rows=6, teachers=10, vocab=14, direction="forward")  # p near 1: dt cancels
def test_any_index(impl, rows, teachers, vocab, direction):
    index = torch.randint(-1, teachers, (rows,), generator=torch.Generator().manual_seed(vocab))
    case = (index, teachers, vocab, (9, 17), True, direction, {})
    truth = run("reference", torch.float64, *case)
    assert_as_good(run(impl, torch.float32, *case), run("plain", torch.float32, *case), truth)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_reference_gradients_by_finite_differences(direction):
    student = operands((4,), 7, 3, torch.float64)
    teacher = operands((3,), 7, 2, torch.float64)
    index = torch.tensor([2, 0, -1, 2])

    def kl(*tensors: Tensor) -> Tensor:
        return linear_kl(*tensors, index=index, direction=direction, impl="reference").kl

    assert torch.autograd.gradcheck(kl, (*student, *teacher))


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", ["reference", *PATHS])
def test_a_shift_pairs_slots_with_the_row_that_predicts_their_token(impl):
    """Slot j at t predicts token t + shift + j, as the teacher's row t + shift + j - 1 does."""
    hidden, weight = operands((2, 6, 3), 50, 8, torch.float32)
    teacher = torch.randn(2, 6, 8)
    document = torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6])
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    index = torch.full((2, 6, 3), -1)
    for b in range(2):
        for t in range(6):
            for j in range(3):
                row = t + 2 + j - 1
                if row < 6 and document[b, row] == document[b, t] and mask[b, row]:
                    index[b, t, j] = 6 * b + row
    out = linear_kl(hidden, weight, teacher, shift=2, document=document, mask=mask, impl=impl)
    expected = linear_kl(hidden, weight, teacher, index=index, impl="reference")
    torch.testing.assert_close(out.kl, expected.kl, atol=1e-5, rtol=1e-5)
    assert torch.equal(out.valid, index >= 0)
    assert (out.kl[~out.valid] == 0).all()


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("impl", ["reference", *PATHS])
def test_equal_distributions_do_not_diverge(impl, direction):
    hidden, weight = operands((9,), 50, 8, torch.float32)
    out = linear_kl(
        hidden, weight, hidden.detach(), index=torch.arange(9), direction=direction, impl=impl
    )
    torch.testing.assert_close(out.kl, torch.zeros(9), atol=1e-5, rtol=0)
    grads = torch.autograd.grad(out.kl.sum(), (hidden, weight))
    assert max(grad.abs().max() for grad in grads) < 1e-4


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
def test_the_default_teacher_weight_is_fixed(impl):
    hidden, weight = operands((5,), 50, 8, torch.float32)
    teacher, index = torch.randn(5, 8), torch.arange(5)
    default = linear_kl(hidden, weight, teacher, index=index, impl=impl).kl.sum()
    explicit = linear_kl(hidden, weight, teacher, weight.detach(), index=index, impl=impl).kl.sum()
    for a, b in zip(
        torch.autograd.grad(default, (hidden, weight)),
        torch.autograd.grad(explicit, (hidden, weight)),
        strict=True,
    ):
        assert torch.equal(a, b)


@given(st.lists(st.integers(-1, 9), max_size=40), st.integers(1, 5), st.integers(1, 7))
def test_a_plan_makes_every_teacher_once_and_meets_every_student_once(index, rows, pieces):
    plan = make_plan(torch.tensor(index, dtype=torch.long))
    met, made = [], []
    for chunk in chunks(plan, rows, pieces):
        teachers = plan.teachers[chunk.teachers].tolist()
        assert 0 < len(teachers) <= rows
        made += teachers
        for part in chunk.students:
            assert 0 < part.stop - part.start <= pieces
            places = (plan.place[part] - chunk.teachers.start).tolist()
            for student, place in zip(plan.students[part].tolist(), places, strict=True):
                assert index[student] == teachers[place]
                met.append(student)
    assert sorted(met) == [n for n, teacher in enumerate(index) if teacher >= 0]
    assert made == sorted({teacher for teacher in index if teacher >= 0})


def test_wrong_arguments_say_what_is_expected():
    hidden, weight, teacher = torch.randn(3, 4), torch.randn(9, 4), torch.randn(3, 4)
    index = torch.arange(3)
    cases = (
        ({}, r"hidden must be \[B, T, K, D\]"),
        ({"index": index, "direction": "sideways"}, "direction must be"),
        ({"index": index[:2]}, "index must have hidden's leading shape"),
        ({"index": index, "mask": index}, "go without index"),
        ({"index": index, "teacher_weight": torch.randn(8, 4)}, "share one vocabulary"),
    )
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_kl(hidden, weight, teacher, **arguments)


@pytest.mark.parametrize("impl", ("reference", *PATHS))
def test_the_default_teacher_has_the_bias_of_its_weight(impl):
    hidden, weight, bias = operands((6,), 33, 8, torch.float32, bias=True)
    index = torch.arange(6)
    same = linear_kl(hidden, weight, hidden.detach(), index=index, bias=bias, impl=impl).kl
    torch.testing.assert_close(same, torch.zeros(6), atol=1e-5, rtol=0)


def test_a_divergence_of_large_logits_has_no_error_of_their_sum(chunked):
    """The log-sum-exp of logits near 1,000 is rounded to a multiple of 6e-5."""
    bias = torch.full((50,), 1000.0)
    # Multiples of 1/4, so that the logits are exact.
    hidden, weight, teacher = (torch.randint(-4, 5, (n, 8)) / 4 for n in (40, 50, 40))
    given = {"index": torch.arange(40), "bias": bias, "teacher_bias": bias}
    got = linear_kl(hidden, weight, teacher, weight, impl="torch", **given).kl
    x, t = (h.double() @ weight.double().T for h in (hidden, teacher))
    log_q, log_p = x.log_softmax(-1), t.log_softmax(-1)
    true = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert float((got - true).abs().max()) < 5e-6
