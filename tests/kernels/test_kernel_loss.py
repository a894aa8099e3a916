"""`linear_loss`: its value and its gradients made in the forward, against float64 autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SCALINGS, assert_as_good, operands, plain_logits
from mtp_kernels import linear_logprob, linear_loss
from torch import Tensor

PATHS = ("torch", "triton")
OBJECTIVES = ("ce", "z", "policy")


def objective(name: str, rows: int) -> dict[str, object]:
    if name == "policy":
        return {
            "advantage": torch.linspace(-1, 1, rows),
            "old_logprob": torch.linspace(-9, -0.1, rows),
            "clip_low": 0.1,
            "clip_high": 0.3,
        }
    return {"z_loss": 1e-2} if name == "z" else {}


def plain_loss(hidden, weight, bias, target, row_weight, name, **scaling) -> Tensor:
    x = plain_logits(hidden, weight, bias, **scaling)
    lse = torch.logsumexp(x, -1)
    valid = target != -100
    logprob = x.gather(-1, torch.where(valid, target, 0)[:, None])[:, 0] - lse
    if name == "policy":
        given = objective(name, len(target))
        ratio = (logprob - given["old_logprob"]).exp()
        advantage = given["advantage"]
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.3) * advantage)
    else:
        loss = -logprob + (1e-2 * lse**2 if name == "z" else 0.0)
    return torch.where(valid, loss * row_weight, 0.0).sum()


def run(impl, dtype, name, target, vocab, depth, bias, scaling) -> list[Tensor]:
    torch.manual_seed(3)
    tensors = operands(target.shape, vocab, depth, dtype, bias)
    hidden, weight, *rest = tensors
    b = rest[0] if bias else None
    row_weight = torch.linspace(0.1, 1, len(target))
    if impl == "plain":
        loss = plain_loss(hidden, weight, b, target, row_weight, name, **scaling)
    else:
        loss = linear_loss(
            hidden,
            weight,
            target,
            bias=b,
            impl=impl,
            row_weight=row_weight,
            **objective(name, len(target)),
            **scaling,
        ).loss
    return [loss, *torch.autograd.grad(3.0 * loss, tensors)]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", ["plain", "both"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("impl", PATHS)
def test_values_and_gradients_are_as_good_as_plain_code(impl, name, scaling, dtype):
    target = torch.randint(0, 101, (37,))
    target[::5] = -100
    case = (name, target, 101, 24, scaling == "both", SCALINGS[scaling])
    truth = run("reference", torch.float64, *case)
    assert_as_good(run(impl, dtype, *case), run("plain", dtype, *case), truth)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 80),
    depth=st.integers(1, 40),
    ignored=st.floats(0, 1),
    name=st.sampled_from(OBJECTIVES),
)
def test_any_shape_and_mask(impl, rows, vocab, depth, ignored, name):
    target = torch.randint(0, vocab, (rows,))
    target[torch.rand(rows) < ignored] = -100
    case = (name, target, vocab, depth, True, {})
    truth = run("reference", torch.float64, *case)
    assert_as_good(run(impl, torch.float32, *case), run("plain", torch.float32, *case), truth)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_reference_gradients_by_finite_differences(name):
    hidden, weight, bias = operands((4,), 7, 3, torch.float64, bias=True)
    target = torch.tensor([0, 6, -100, 2])

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_loss(h, w, target, bias=b, impl="reference", **objective(name, 4)).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", ["reference", *PATHS])
def test_each_slot_is_averaged_over_its_own_tokens(impl):
    """Three positions, two slots: slot 0 has 2 targets, slot 1 has 1."""
    hidden, weight = operands((1, 3, 2), 50, 8, torch.float32)
    tokens = torch.tensor([[4, 5, 6]])
    out = linear_loss(
        hidden, weight, tokens=tokens, slot_weight=torch.tensor([1.0, 10.0]), impl=impl
    )
    target = torch.tensor([[[5, 6], [6, -100], [-100, -100]]])
    logprob = linear_logprob(hidden, weight, target, impl="reference").logprob
    expected = -(logprob[0, 0, 0] + logprob[0, 1, 0]) / 2 - 10 * logprob[0, 0, 1]
    torch.testing.assert_close(out.loss, expected.detach(), check_stride=False)
    torch.testing.assert_close(out.logprob, logprob.detach(), atol=1e-5, rtol=1e-5)
    counted = linear_loss(
        hidden, weight, tokens=tokens, slot_count=torch.tensor([20.0, 10.0]), impl=impl
    )
    expected = -(logprob[0, 0, 0] + logprob[0, 1, 0]) / 20 - logprob[0, 0, 1] / 10
    torch.testing.assert_close(counted.loss, expected.detach())


@pytest.mark.parametrize("impl", PATHS)
def test_a_ratio_past_its_bound_gets_no_gradient(impl, chunked):
    hidden, weight = operands((4,), 50, 8, torch.float32)
    target = torch.tensor([1, 2, 3, 4])
    logprob = linear_logprob(hidden, weight, target).logprob.detach()
    move = torch.tensor([0.5, -0.5, 0.5, -0.5])  # nats by which the policy moved
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    out = linear_loss(
        hidden, weight, target, advantage=advantage, old_logprob=logprob - move, impl=impl
    )
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert (grad.abs().sum(-1) > 0).tolist() == [False, True, True, False]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
def test_rows_log_what_linear_logprob_gives(impl):
    hidden, weight = operands((9,), 50, 8, torch.float32)
    target = torch.randint(0, 50, (9,))
    loss = linear_loss(hidden, weight, target, impl=impl)
    rows = linear_logprob(hidden, weight, target, impl="reference")
    for got, expected in zip(loss[1:], rows, strict=True):
        torch.testing.assert_close(got, expected.detach(), atol=1e-5, rtol=1e-5)
        assert not got.requires_grad


@pytest.mark.usefixtures("chunked")
def test_only_what_requires_a_gradient_gets_one_and_only_once():
    hidden, weight = operands((9,), 50, 8, torch.float32)
    target = torch.randint(0, 50, (9,))
    loss = linear_loss(hidden, weight.detach(), target).loss
    loss.backward(retain_graph=True)
    assert weight.grad is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.no_grad():
        assert not linear_loss(hidden, weight, target).loss.requires_grad


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
def test_a_loss_scale_keeps_the_gradients_of_float16(impl):
    """Weights of one by a million tokens, and a scale that float16 cannot hold itself."""
    scale, target = 2.0**20, torch.randint(0, 500, (40,))
    row_weight = torch.full((40,), 1e-6)

    def gradients(impl: str, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(3)
        hidden, weight, bias = operands((40,), 500, 16, dtype, bias=True)
        if impl == "plain":
            loss = plain_loss(hidden, weight, bias, target, row_weight, "ce")
        else:
            keys = {"bias": bias, "row_weight": row_weight, "impl": impl}
            loss = linear_loss(hidden, weight, target, **keys).loss
        return list(torch.autograd.grad(scale * loss, (hidden, weight, bias)))

    truth = gradients("reference", torch.float64)
    plain = gradients("plain", torch.float16)
    for got, naive, true in zip(gradients(impl, torch.float16), plain, truth, strict=True):
        assert got.dtype == torch.float16
        error, allowed = ((g.double() - true).norm() / true.norm() for g in (got, naive))
        assert error <= 1.5 * allowed < 0.01


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
def test_a_mean_over_many_rows_fits_float16_where_their_sum_does_not(impl):
    hidden, weight = torch.full((500, 1), 1200.0), torch.zeros(17, 1)
    leaves = [t.half().requires_grad_() for t in (hidden, weight)]
    target = torch.zeros(500, dtype=torch.long)
    (grad,) = torch.autograd.grad(linear_loss(*leaves, target, impl=impl).loss, leaves[1])
    expected = torch.full((17, 1), 1200 / 17)
    expected[0] -= 1200
    torch.testing.assert_close(grad, expected.half(), atol=0, rtol=2e-3)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
def test_an_upstream_gradient_is_not_rounded_to_the_operands_dtype(impl):
    leaves = operands((9,), 50, 8, torch.bfloat16)
    target = torch.randint(0, 50, (9,))
    upstream = torch.tensor(1 / 3)
    once, third = (
        torch.autograd.grad(linear_loss(*leaves, target, impl=impl).loss * factor, leaves)
        for factor in (1.0, upstream)
    )
    for got, whole in zip(third, once, strict=True):
        assert torch.equal(got, (whole.float() * upstream).bfloat16())


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("weights", [(-3.0, 0.0, 1e-30), (0.0, 0.0, 0.0)], ids=str)
@pytest.mark.parametrize("impl", PATHS)
def test_row_weights_of_any_sign_and_size(impl, weights):
    """The weight of the last row does not count, since that row is ignored."""
    row_weight = torch.tensor([*weights, torch.inf])
    leaves = operands((4,), 50, 8, torch.float32)
    target = torch.tensor([1, 2, 3, -100])
    results = []
    for path in (impl, "reference"):
        keys = {"row_weight": row_weight.nan_to_num(posinf=0) if path != impl else row_weight}
        loss = linear_loss(*leaves, target, impl=path, **keys).loss
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_wrong_arguments_say_what_is_expected():
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    target = torch.zeros(3, dtype=torch.long)
    cases = (
        ({"advantage": torch.ones(3)}, "advantage and old_logprob go together"),
        ({"row_weight": torch.ones(2)}, "row_weight must have hidden's leading shape"),
        ({"row_weight": torch.ones(3), "slot_weight": torch.ones(1)}, "not both"),
        ({"slot_weight": torch.ones(2)}, "slot_weight and slot_count must be"),
    )
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_loss(hidden, weight, target, **arguments)


def test_a_sum_over_many_rows_fits_float16_within_autocast():
    hidden, weight = torch.full((40_000, 4), 4.0), torch.zeros(8, 4, requires_grad=True)
    target = torch.zeros(40_000, dtype=torch.long)
    with torch.autocast("cpu", torch.float16):
        linear_loss(hidden, weight, target, impl="torch").loss.backward()
    expected = torch.full((8, 4), 0.5)
    expected[0] = 0.5 - 4
    torch.testing.assert_close(weight.grad, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("impl", ("reference", *PATHS))
def test_no_slots_are_no_loss(impl):
    target = torch.zeros(2, 3, 0, dtype=torch.long)
    out = linear_loss(torch.randn(2, 3, 0, 4), torch.randn(9, 4), target, impl=impl)
    assert out.loss == 0 and out.logprob.shape == (2, 3, 0)


def test_weights_by_slot_are_as_precise_as_the_operands():
    hidden, weight = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 3, 1, 4), (9, 4)))
    target = torch.tensor([[[1], [2], [3]]])
    plain = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 2), target.flatten())
    loss = linear_loss(hidden, weight, target, impl="reference").loss
    torch.testing.assert_close(loss, plain, rtol=1e-14, atol=0)
