"""torch's FLOP counter sees the matrix products of every op, also of those with an own operator."""

import mtp_kernels.flops  # noqa: F401
import pytest
import torch
from mtp_kernels import linear_kl, linear_logprob, linear_loss, linear_sample
from torch.utils.flop_counter import FlopCounterMode, flop_registry

ROWS, VOCAB, DEPTH = 12, 30, 8
PRODUCT = 2 * ROWS * VOCAB * DEPTH


def products_of(call, *, backward: bool) -> float:
    """FLOPs of a call, in products of [ROWS, DEPTH] with [VOCAB, DEPTH]."""
    with FlopCounterMode(display=False) as counter:
        value = call()[0]
        if backward:
            value.sum().backward()
    return counter.get_total_flops() / PRODUCT


@pytest.fixture
def operands(chunked):
    hidden = torch.randn(ROWS, DEPTH, requires_grad=True)
    return hidden, torch.randn(VOCAB, DEPTH, requires_grad=True), torch.arange(ROWS)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_loss_has_the_products_of_logits_and_of_two_gradients(operands, impl):
    assert products_of(lambda: linear_loss(*operands, impl=impl), backward=True) == 3
    hidden, weight, target = operands
    frozen = weight.detach()
    found = products_of(lambda: linear_loss(hidden, frozen, target, impl=impl), backward=True)
    assert found == 2


@pytest.mark.parametrize("impl, again", [("reference", 0), ("torch", 1)])
def test_the_log_probability_makes_its_logits_again_in_the_backward(operands, impl, again):
    assert products_of(lambda: linear_logprob(*operands, impl=impl), backward=True) == 3 + again


@pytest.mark.parametrize("impl, again", [("reference", 0), ("torch", 2)])
def test_the_divergence_has_the_products_of_student_and_teacher(operands, impl, again):
    hidden, weight, index = operands
    teacher = hidden.detach().flip(0)

    def call(teacher_weight):
        return lambda: linear_kl(hidden, weight, teacher, teacher_weight, index=index, impl=impl)

    assert products_of(call(weight.detach()), backward=True) == 4 + again
    assert products_of(call(weight.detach().clone().requires_grad_()), backward=True) == 5 + again


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_sampling_has_the_products_of_its_logits(operands, impl):
    hidden, weight, position = (t.detach() for t in operands)
    given = {"seed": 1, "position": position, "impl": impl}
    assert products_of(lambda: linear_sample(hidden, weight, **given), backward=False) == 1


def test_every_operator_of_the_package_is_counted():
    names = {n.split(".")[0] for n in torch._C._dispatch_get_all_op_names()}
    own = {n.removeprefix("mtp_kernels::") for n in names if n.startswith("mtp_kernels::")}
    assert len(own) >= 7
    assert not {n for n in own if getattr(torch.ops.mtp_kernels, n) not in flop_registry}
