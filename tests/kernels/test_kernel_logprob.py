"""`linear_logprob`: values and gradients of every path against float64, and its edge cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SCALINGS, assert_as_good, operands, plain_logits
from mtp_kernels import dispatch, linear_logprob
from torch import Tensor

PATHS = ("torch", "triton")


def plain_logprob(hidden, weight, bias, target, **scaling) -> tuple[Tensor, Tensor, Tensor]:
    log_p = plain_logits(hidden, weight, bias, **scaling)
    lse = torch.logsumexp(log_p, -1)
    log_p = log_p - lse[..., None]
    valid = target != -100
    picked = log_p.gather(-1, torch.where(valid, target, 0)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return tuple(torch.where(valid, t, 0.0) for t in (picked, lse, entropy))


def with_gradients(values: tuple[Tensor, ...], tensors: list[Tensor]) -> list[Tensor]:
    """Values, and gradients of a loss with a different weight in every row of every value."""
    rows = torch.linspace(-1, 2, values[0].numel(), dtype=torch.float64).view_as(values[0])
    loss = sum((v * (rows**n).to(v.dtype)).sum() for n, v in enumerate(values, 1))
    return [*values, *torch.autograd.grad(loss, tensors)]


def run(impl: str, dtype: torch.dtype, target: Tensor, vocab: int, depth: int, bias, scaling):
    torch.manual_seed(3)
    tensors = operands(target.shape, vocab, depth, dtype, bias)
    hidden, weight, *rest = tensors
    if impl == "plain":
        values = plain_logprob(hidden, weight, rest[0] if bias else None, target, **scaling)
    else:
        b = rest[0] if bias else None
        values = linear_logprob(hidden, weight, target, bias=b, impl=impl, **scaling)[:3]
    return with_gradients(values, tensors)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("impl", PATHS)
def test_values_and_gradients_are_as_good_as_plain_code(impl, scaling, dtype):
    target = torch.randint(0, 101, (37,))
    target[::5] = -100
    case = (target, 101, 24, scaling == "both", SCALINGS[scaling])
    truth = run("reference", torch.float64, *case)
    assert_as_good(run(impl, dtype, *case), run("plain", dtype, *case), truth)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 80),
    depth=st.integers(1, 40),
    ignored=st.floats(0, 1),
    scaling=st.sampled_from(sorted(SCALINGS)),
)
def test_any_shape_and_mask(impl, rows, vocab, depth, ignored, scaling):
    target = torch.randint(0, vocab, (rows,))
    target[torch.rand(rows) < ignored] = -100
    case = (target, vocab, depth, True, SCALINGS[scaling])
    truth = run("reference", torch.float64, *case)
    result = run(impl, torch.float32, *case)
    assert_as_good(result, run("plain", torch.float32, *case), truth)
    assert (result[0] <= 0).all()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_reference_gradients_by_finite_differences(scaling):
    hidden, weight, bias = operands((4,), 7, 3, torch.float64, bias=True)
    target = torch.tensor([0, 6, -100, 2])

    def values(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return linear_logprob(h, w, target, bias=b, impl="reference", **SCALINGS[scaling])[:3]

    assert torch.autograd.gradcheck(values, (hidden, weight, bias))


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", ["reference", *PATHS])
def test_a_uniform_row_by_hand(impl):
    hidden, weight = torch.zeros(2, 4), torch.ones(50, 4)
    out = linear_logprob(hidden, weight, torch.tensor([7, 49]), impl=impl)
    log_v = torch.log(torch.tensor(50.0))
    torch.testing.assert_close(out.logprob, -log_v.expand(2))
    torch.testing.assert_close(out.lse, log_v.expand(2))
    torch.testing.assert_close(out.entropy, log_v.expand(2))
    assert out.argmax.tolist() == [0, 0], "ties go to the lower id"


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", ["reference", *PATHS])
def test_logits_far_below_zero_do_not_overflow(impl):
    hidden, weight = torch.full((3, 1), -300.0), torch.ones(70, 1)
    weight[5] = 0.9  # logits -300, one -270: its probability is 1 in float32
    out = linear_logprob(hidden, weight, torch.tensor([5, 0, 69]), impl=impl)
    torch.testing.assert_close(out.logprob, torch.tensor([0.0, -30.0, -30.0]))
    torch.testing.assert_close(out.lse, torch.full((3,), -270.0))
    assert out.argmax.tolist() == [5, 5, 5]
    assert (out.logprob <= 0).all()


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", ["reference", *PATHS])
def test_ignored_rows_are_zero_and_without_gradient(impl):
    hidden, weight = operands((5,), 33, 8, torch.float32)
    out = linear_logprob(hidden, weight, torch.full((5,), -100), impl=impl)
    assert all((value == 0).all() for value in out[:3])
    assert (out.argmax == -1).all()
    grads = torch.autograd.grad(out.logprob.sum() + out.lse.sum(), (hidden, weight))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("first, last", [(0, 10), (290, 300), (120, 180)])
def test_forbidden_ids_by_a_bias_of_minus_infinity(first, last, impl):
    """Two of three tiles of the vocabulary are forbidden as a whole."""
    leaves = operands((20,), 300, 8, torch.float32)
    assert dispatch.tile_of(20, 300, leaves[0]) == (20, 100)
    bias = torch.full((300,), -torch.inf)
    bias[first:last] = 0.0
    target = torch.arange(20) % 10 + first
    out = linear_logprob(*leaves, target, bias=bias, impl=impl)
    hidden, weight = leaves
    short = linear_logprob(hidden, weight[first:last], target - first, impl="reference")
    short = short._replace(argmax=short.argmax + first)
    for value, expected in zip(out, short, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    ours, expected = (with_gradients(values[:3], leaves)[3:] for values in (out, short))
    for got, value in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
def test_tokens_with_a_shift_are_the_targets_written_out(impl):
    hidden, weight = operands((2, 9, 3), 50, 8, torch.float32)
    tokens = torch.randint(0, 50, (2, 9))
    document = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    mask = torch.rand(2, 9) > 0.2
    target = torch.full((2, 9, 3), -100)
    for b in range(2):
        for t in range(9):
            for j in range(3):
                u = t + 2 + j
                if u < 9 and document[b, u] == document[b, t] and mask[b, u]:
                    target[b, t, j] = tokens[b, u]
    by_tokens = linear_logprob(
        hidden, weight, tokens=tokens, shift=2, document=document, mask=mask, impl=impl
    )
    by_target = linear_logprob(hidden, weight, target, impl="reference")
    for got, expected in zip(by_tokens, by_target, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_small_problems_agree_with_the_reference_and_differentiate_twice():
    hidden, weight = operands((3,), 20, 4, torch.float32)
    out = linear_logprob(hidden, weight, torch.tensor([1, 2, 3]))
    (grad,) = torch.autograd.grad(out.logprob.sum(), hidden, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), weight)[0].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # in inductor
def test_compiled_chunks_agree_with_eager_ones(chunked, monkeypatch):
    if not dispatch.compiler_found():
        pytest.skip("needs a C++ compiler")
    target = torch.randint(0, 101, (37,))
    case = (target, 101, 24, True, SCALINGS["both"])
    eager = run("torch", torch.float32, *case)
    monkeypatch.setattr(dispatch, "COMPILE_NUMEL", 0)
    for a, b in zip(run("torch", torch.float32, *case), eager, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    hidden, weight = torch.zeros(2, 4), torch.ones(101, 4)
    assert linear_logprob(hidden, weight, torch.tensor([7, 49])).argmax.tolist() == [0, 0], "ties"
    hidden, weight = (t.detach() for t in operands((37,), 101, 24, torch.float32))
    argmax = linear_logprob(hidden, weight, target.clamp_min(0)).argmax
    assert torch.equal(argmax, (hidden @ weight.T).argmax(-1))


def test_nothing_is_compiled_for_small_problems_or_without_a_compiler(monkeypatch):
    def body() -> None:
        raise AssertionError

    assert dispatch.maybe_compiled(body, 100, 20) is body
    assert dispatch.maybe_compiled(body, 100, 20, sampling=True) is body
    monkeypatch.setattr(dispatch, "compiler_found", lambda: False)
    assert dispatch.maybe_compiled(body, 1 << 20, 1 << 20) is body


def test_wrong_arguments_say_what_is_expected():
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    target = torch.zeros(3, dtype=torch.long)
    cases = (
        ({"target": target[:2]}, "target must have hidden's leading shape"),
        ({}, "exactly one of target and tokens"),
        ({"target": target, "temperature": 0.0}, "temperature must be > 0"),
        ({"target": target, "impl": "cuda"}, "impl must be one of"),
        ({"target": target, "mask": target.bool()}, "go with tokens"),
        ({"target": target, "bias": torch.zeros(4)}, "bias must be"),
    )
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_logprob(hidden, weight, **arguments)
    with pytest.raises(ValueError, match="share one dtype"):
        linear_logprob(hidden, weight.bfloat16(), target)
