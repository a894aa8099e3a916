"""Arguments: refused by name, or supported with one number in all implementations."""

import math

import numpy as np
import pytest
import torch
from kernel_calls import IMPLS, OPS, VOCAB, calls, results
from mtp_kernels import linear_logprob, linear_sample, linear_verify
from mtp_kernels.linear_logprob import op as logprob_op
from torch import Tensor

pytestmark = pytest.mark.usefixtures("chunked", "one_rank")
SCALED = [op for op in OPS if op != "shifted_targets"]
INTEGERS = [
    (op, number, name)
    for op in OPS
    for number, operands in enumerate(calls(op))
    for name, tensor in operands.items()
    if tensor.dtype == torch.int64
]
GREEDY = ("linear_sample", "linear_sample_parallel", "linear_verify")


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op, number, name", INTEGERS)
def test_integers_of_32_bits_are_read_as_those_of_64(op, number, name, impl):
    operands = calls(op)[number]
    short = (operands[name] % 2**31).int() if name == "seed" else operands[name].int()
    expected = results(op, {**operands, name: short.long()}, "reference")
    assert_same(results(op, {**operands, name: short}, impl), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("op, number, name", INTEGERS)
def test_what_holds_no_integers_is_refused(op, number, name, dtype):
    if name == "slot_count":  # a number to divide by
        return
    operands = calls(op)[number]
    for impl in IMPLS:
        with pytest.raises(ValueError, match=rf"{name} must hold integers, got {dtype}"):
            results(op, {**operands, name: operands[name].to(dtype)}, impl)


@pytest.mark.parametrize("op", ["shifted_targets", "linear_logprob", "linear_loss", "linear_kl"])
def test_masks_and_documents_are_one_per_token_and_masks_are_bool(op):
    operands = calls(op)[-1]
    for dtype in (torch.int64, torch.uint8, torch.float32):
        with pytest.raises(ValueError, match=f"mask must be bool, got {dtype}; use mask != 0"):
            results(op, {**operands, "mask": operands["mask"].to(dtype)}, "reference")
    for name in ("mask", "document"):
        for wrong in (operands[name][:1], operands[name].repeat(1, 2)):
            with pytest.raises(ValueError, match=rf"{name} must be \[B, T\] = \[2, 2\]"):
                results(op, {**operands, name: wrong}, "reference")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", SCALED)
def test_temperature_and_softcap_are_finite_and_positive(op, impl):
    wrong = {
        "temperature": [math.nan, math.inf, -1.0] + ([] if op in GREEDY else [0.0]),
        "softcap": [math.nan, math.inf, -5.0, 0.0],
    }
    for name, values in wrong.items():
        for value in (*values, torch.tensor(1.0)):
            with pytest.raises(ValueError, match=f"{name} must be "):
                results(op, calls(op)[0], impl, **{name: value})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ["linear_logprob", "linear_loss"])
@pytest.mark.parametrize("wrong", [VOCAB, -5])
def test_a_target_outside_of_the_vocabulary_is_refused(op, wrong, impl):
    target = calls(op)[0]["target"].clone()
    target[2] = wrong
    with pytest.raises(ValueError, match=rf"target must be in \[0, {VOCAB}\).*got {wrong}"):
        results(op, {**calls(op)[0], "target": target}, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_draft_outside_of_the_vocabulary_is_refused_unless_it_is_none(impl):
    operands = calls("linear_verify")[0]
    draft = operands["draft"].clone()
    draft[2] = torch.tensor([-100, VOCAB])  # behind the first ignore_index there is no draft
    dropped = draft.clone()
    dropped[2, 1] = -100
    expected = results("linear_verify", {**operands, "draft": dropped}, "reference")
    assert_same(results("linear_verify", {**operands, "draft": draft}, impl), expected)
    draft[2, 0] = 1
    with pytest.raises(ValueError, match=rf"draft must be in \[0, {VOCAB}\).*got {VOCAB}"):
        results("linear_verify", {**operands, "draft": draft}, impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_target_that_is_not_checked_has_no_log_probability(impl, monkeypatch):
    """With ignore_index=None a GPU is not waited for, which is what checking would take."""
    monkeypatch.setattr(logprob_op, "check_ids", lambda *_, **__: None)
    operands = calls("linear_logprob")[0]
    target = operands["target"].clamp_min(0)
    expected = linear_logprob(operands["hidden"], operands["weight"], target).logprob
    wrong = target.clone()
    wrong[2], wrong[3] = VOCAB, -5
    out = linear_logprob(
        operands["hidden"], operands["weight"], wrong, ignore_index=None, impl=impl
    ).logprob
    assert out.isnan().tolist() == [False, False, True, True, False, False, False]
    torch.testing.assert_close(out[wrong == target], expected[wrong == target])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_target_that_no_rank_has_has_no_log_probability(impl):
    operands = calls("linear_logprob_parallel")[0]
    expected = results("linear_logprob_parallel", operands, impl)["logprob"]
    target = operands["target"].clone()
    target[2], target[3] = VOCAB, -5
    got = results("linear_logprob_parallel", {**operands, "target": target}, impl)["logprob"]
    assert got[2:4].isnan().all()
    torch.testing.assert_close(got[4:], expected[4:])


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.float64])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["advantage", "old_logprob", "row_weight"])
def test_a_value_per_row_of_any_dtype_gives_a_loss_in_float32(name, impl, dtype):
    operands = calls("linear_loss")[0]
    value = operands[name].to(dtype)
    expected = results("linear_loss", {**operands, name: value.float()}, "reference")
    got = results("linear_loss", {**operands, name: value.detach()}, impl)
    assert got["loss"].dtype == torch.float32
    got, expected = ({k: v for k, v in r.items() if v is not None} for r in (got, expected))
    assert_same(got, expected)


@pytest.mark.parametrize("op", SCALED)
def test_a_bias_is_floating_point_and_changes_no_dtype(op):
    operands = calls(op)[0]
    for name in {"bias", "teacher_bias", "draft_bias"} & operands.keys():
        bias = operands[name]
        with pytest.raises(ValueError, match="bias must be floating point, got torch.int64"):
            results(op, {**operands, name: bias.long()}, "reference")
        with pytest.raises(ValueError, match="use impl='torch'"):
            results(op, {**operands, name: bias.double()}, "triton")
        expected = results(op, operands, "reference")
        for impl in ("reference", "torch"):
            got = results(op, {**operands, name: bias.double()}, impl)
            key = f"gradient by {name}"
            if got.get(key) is not None:
                assert got[key].dtype == torch.float64
                got[key] = got[key].float()
            assert_same(got, expected)


@pytest.mark.parametrize("op", SCALED)
def test_operands_of_integers_and_empty_weights_are_refused(op):
    operands = calls(op)[0]
    whole = {**operands, "hidden": operands["hidden"].long(), "weight": operands["weight"].long()}
    with pytest.raises(ValueError, match="hidden must be floating point"):
        results(op, whole, "reference")
    with pytest.raises(ValueError, match=r"weight must be \[V, D\] and not empty"):
        results(op, {**operands, "weight": operands["weight"][:0]}, "reference")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", SCALED)
def test_a_row_of_nan_gives_nan_and_ids_of_the_vocabulary_and_changes_no_other_row(op, impl):
    operands = calls(op)[0]
    expected = results(op, operands, impl)
    got = results(
        op,
        {**operands, "hidden": operands["hidden"].index_fill(0, torch.tensor(2), math.nan)},
        impl,
    )
    others = torch.arange(7) != 2
    for name in ("logprob", "lse", "entropy", "kl"):
        if name in got:
            assert got[name][2].flatten()[0].isnan(), name
            torch.testing.assert_close(got[name][others], expected[name][others])
    for name in ("token", "argmax"):
        if name in got:
            assert 0 <= got[name][2] < VOCAB, name
            assert torch.equal(got[name][others], expected[name][others])


@pytest.mark.parametrize("op", [op for op in SCALED if not op.endswith("_parallel")])
def test_the_reference_is_float32_within_autocast_too(op):
    operands = {
        name: (1.37 * tensor).bfloat16().float() if tensor.is_floating_point() else tensor
        for name, tensor in calls(op)[0].items()
    }
    expected = results(op, operands, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        got = results(op, operands, "reference")
    for name in ("logprob", "lse", "entropy", "kl"):
        if name in got:
            torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("op", ["linear_logprob_parallel", "linear_sample_parallel"])
def test_parallel_ops_take_the_dtype_of_autocast(op, one_rank):
    operands = calls(op)[0]
    expected = results(op, operands, "torch")
    with torch.autocast("cpu", torch.bfloat16):
        got = results(op, {**operands, "hidden": operands["hidden"].bfloat16()}, "torch")
    torch.testing.assert_close(got["logprob"], expected["logprob"], atol=0.05, rtol=0.01)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_forbidden_target_has_log_probability_minus_infinity(impl):
    operands = calls("linear_logprob")[0]
    target = int(operands["target"][0])
    bias = operands["bias"].index_fill(0, torch.tensor(target), -math.inf)
    got = results("linear_logprob", {**operands, "bias": bias}, impl, softcap=None)
    of_it = operands["target"] == target
    assert bool((got["logprob"][of_it] == -math.inf).all())
    assert got["logprob"][~of_it].isfinite().all()


def test_a_seed_is_any_whole_number():
    hidden, weight, position = torch.randn(3, 4), torch.randn(9, 4), torch.arange(3)
    expected = linear_sample(hidden, weight, seed=3, position=position).token
    assert torch.equal(
        linear_sample(hidden, weight, seed=np.int64(3), position=position).token, expected
    )
    with pytest.raises(TypeError, match="integer"):
        linear_sample(hidden, weight, seed=3.5, position=position)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("narrow", ["hidden", "draft_hidden"])
def test_main_and_drafter_may_differ_in_dtype(narrow, impl):
    operands = calls("linear_verify")[0]
    weight = {"hidden": "weight", "draft_hidden": "draft_weight"}[narrow]
    mixed = {**operands, **{name: operands[name].bfloat16() for name in (narrow, weight)}}
    expected = results("linear_verify", operands, "reference", softcap=None, temperature=1.0)
    got = results("linear_verify", mixed, impl, softcap=None, temperature=1.0)
    assert torch.equal(got["num_accepted"], expected["num_accepted"])
    assert torch.equal(got["token"], expected["token"])
    # On a CPU products of bfloat16 operands are rounded to it, but for the reference's.
    torch.testing.assert_close(got["logprob"], expected["logprob"], atol=0.05, rtol=0.01)


def test_wrong_drafts_and_clips_say_what_is_expected():
    operands = calls("linear_verify")[0]
    cases = (
        ({"draft": operands["draft"][:, :0]}, r"draft must be \[N, K\] with K >= 1"),
        ({"draft": operands["draft"][0]}, r"draft must be \[N, K\] with K >= 1"),
        (
            {
                "draft_weight": operands["draft_weight"][:9],
                "draft_bias": operands["draft_bias"][:9],
            },
            "must share one vocabulary, got 25 and 9",
        ),
    )
    for changed, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_verify(**{**operands, **changed})
    for name in ("clip_low", "clip_high"):
        for value in (-0.1, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be >= 0"):
                results("linear_loss", calls("linear_loss")[0], "reference", **{name: value})
