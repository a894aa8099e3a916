"""Every op's Triton kernels on a GPU, at odd sizes and at real ones, against float64."""

import pytest
import torch
from kernel_cases import SCALINGS, assert_as_good, chi_square_is_plausible, operands, plain_logits
from mtp_kernels import linear_kl, linear_logprob, linear_loss, linear_sample, linear_verify
from mtp_kernels.dispatch import triton_interpreted
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or triton_interpreted(),
        reason="needs a CUDA device, and TRITON_INTERPRET=0",
    ),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((37, 24, 101), (130, 72, 1000), (2048, 576, 49_152), (300, 896, 151_936))
"""Rows, D, V."""
DIFFERENTIABLE = ("linear_logprob", "linear_loss", "linear_kl")


@pytest.fixture(autouse=True)
def on_the_device():
    with torch.device("cuda"):
        yield


def loss_of(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, impl: str, **scaling):
    """A number that every output with a gradient takes part in; every fourth row is ignored."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    row = torch.arange(rows)
    ignored = row % 4 == 3
    target = torch.where(ignored, -100, row * 7 % vocab)
    upstream = torch.linspace(-1, 2, rows)
    if impl == "plain":
        log_q = plain_logits(hidden, weight, bias, **scaling).log_softmax(-1)
        if op == "linear_kl":
            teacher = hidden.detach().flip(0)[row // 3]
            log_p = plain_logits(teacher, weight.detach(), **scaling).log_softmax(-1)
            kl = torch.where(ignored, 0.0, (log_p.exp() * (log_p - log_q)).sum(-1))
            return (kl * upstream).sum()
        logprob = log_q.gather(-1, target.clamp_min(0)[:, None])[:, 0]
        logprob = torch.where(ignored, 0.0, logprob)
        if op == "linear_loss":
            return -(logprob * (row + 1) / rows).sum()
        entropy = torch.where(ignored, 0.0, -(log_q.exp() * log_q).sum(-1))
        return (upstream * (logprob + 0.5 * entropy)).sum()
    scaling |= {"bias": bias, "impl": impl}
    if op == "linear_loss":
        return linear_loss(hidden, weight, target, row_weight=(row + 1) / rows, **scaling).loss
    if op == "linear_kl":
        index = torch.where(ignored, -1, row // 3)
        return (
            upstream * linear_kl(hidden, weight, hidden.detach().flip(0), index=index, **scaling).kl
        ).sum()
    out = linear_logprob(hidden, weight, target, **scaling)
    return (upstream * (out.logprob + 0.5 * out.entropy)).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_values_and_gradients(op, size, dtype):
    rows, depth, vocab = size
    results = {}
    for name, kind in (("truth", torch.float64), ("plain", dtype), ("triton", dtype)):
        torch.manual_seed(5)
        leaves = operands((rows,), vocab, depth, kind)
        leaves = [(t.detach() * 0.25).requires_grad_() for t in leaves]
        value = loss_of(op, *leaves, None, "triton" if name == "triton" else "plain")
        results[name] = [value, *torch.autograd.grad(value, leaves)]
    assert_as_good(results["triton"], results["plain"], results["truth"])


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("biased", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_scalings(op, biased, scaling):
    results = {}
    for name, kind in (("truth", torch.float64), ("plain", torch.float32), ("triton", None)):
        torch.manual_seed(5)
        leaves = operands((50,), 333, 48, kind or torch.float32, bias=biased)
        bias = leaves[2] if biased else None
        impl = "triton" if name == "triton" else "plain"
        value = loss_of(op, leaves[0], leaves[1], bias, impl, **scaling)
        results[name] = [value, *torch.autograd.grad(value, leaves[:2])]
    assert_as_good(results["triton"], results["plain"], results["truth"])


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_the_same_bits_in_every_run(op):
    hidden, weight = operands((500,), 5000, 576, torch.bfloat16)
    runs = []
    for _ in range(2):
        value = loss_of(op, hidden, weight, None, "triton")
        runs.append([value, *torch.autograd.grad(value, (hidden, weight))])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_compiles_without_graph_breaks(op):
    hidden, weight = operands((64,), 512, 64, torch.float32)
    target, index = torch.arange(64) * 7, torch.arange(64) // 3

    def call(h: Tensor, w: Tensor) -> Tensor:
        if op == "linear_kl":
            return linear_kl(h, w, h.detach().flip(0), index=index).kl
        out = (linear_loss if op == "linear_loss" else linear_logprob)(h, w, target)
        return out[0] * 2

    compiled = torch.compile(call, fullgraph=True)
    ours, eager = compiled(hidden, weight), call(hidden, weight)
    torch.testing.assert_close(ours, eager)
    ours, eager = (torch.autograd.grad(v.sum(), (hidden, weight)) for v in (ours, eager))
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("vocab", [75, 128, 1000])
def test_draws_follow_the_distribution(vocab):
    hidden, weight = (t.detach() for t in operands((1,), vocab, 24, torch.float32))
    hidden = hidden / 5
    draws = 200_000
    out = linear_sample(hidden.expand(draws, -1), weight, seed=7, position=torch.arange(draws))
    every = hidden.expand(vocab, -1)
    logprob = linear_logprob(every, weight, torch.arange(vocab)).logprob
    assert chi_square_is_plausible(out.token.bincount(minlength=vocab).float(), logprob.exp())
    torch.testing.assert_close(out.logprob, logprob[out.token], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("size", [(9, 24, 101), (80, 576, 49_152), (5, 896, 151_936)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_reference_draws_the_same_tokens(size, temperature):
    rows, depth, vocab = size
    hidden, weight = (t.detach() for t in operands((rows,), vocab, depth, torch.float32))
    arguments = {"seed": torch.arange(rows) - 2**40, "position": torch.arange(rows) + 2**33}
    arguments["temperature"] = temperature
    ours = linear_sample(hidden * 0.25, weight * 0.25, impl="triton", **arguments)
    wide = linear_sample(
        hidden.double() * 0.25, weight.double() * 0.25, impl="reference", **arguments
    )
    same = ours.token == wide.token
    assert same.float().mean() > 0.95  # two scores may be a rounding apart
    torch.testing.assert_close(
        ours.logprob[same].double(), wide.logprob[same], atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_verification_agrees_with_the_reference(temperature):
    num, slots, vocab = 60, 4, 5000
    hidden, weight = (t.detach() / 4 for t in operands((num, slots + 1), vocab, 64, torch.float32))
    noise = torch.randn(num, slots, 64) * 0.1
    head, position = hidden[:, :slots] + noise, torch.arange(num) * 100
    draft = linear_sample(
        head, weight, seed=5, position=position[:, None] + torch.arange(slots),
        temperature=temperature, impl="triton",
    ).token  # fmt: skip
    arguments = {"seed": 5, "position": position, "temperature": temperature}
    ours = linear_verify(hidden, weight, draft, head, impl="triton", **arguments)
    case = (hidden.double(), weight.double(), draft, head.double())
    reference = linear_verify(*case, impl="reference", **arguments)
    assert 0 < ours.num_accepted.float().mean() < slots
    same = (ours.num_accepted == reference.num_accepted) & (ours.token == reference.token)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(
        ours.logprob[same].double(), reference.logprob[same], atol=1e-3, rtol=1e-4
    )


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("call", ["sample", "verify"])
def test_decoding_never_waits_for_the_device(call):
    hidden, weight = (t.detach() for t in operands((8, 4), 1000, 64, torch.bfloat16))
    position = torch.arange(8) * 10
    draft = torch.zeros(8, 3, dtype=torch.int64)

    def run():
        if call == "sample":
            linear_sample(hidden[:, 0], weight, seed=1, position=position)
        else:
            linear_verify(hidden, weight, draft, hidden[:, :3], seed=1, position=position)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_no_logits_are_kept(op):
    """The peak of a backward lies far below what all logits would take in float32."""
    rows, depth, vocab = 16_384, 256, 49_152
    hidden, weight = operands((rows,), vocab, depth, torch.bfloat16)
    loss_of(op, hidden[:64], weight, None, "triton").backward()
    weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss_of(op, hidden, weight, None, "triton").backward()
    assert torch.cuda.max_memory_allocated() - before < 0.5 * rows * vocab * 4


def test_a_row_of_nan_gives_nan_and_ids_of_the_vocabulary():
    hidden, weight = torch.randn(4, 24), torch.randn(75, 24)
    hidden[2] = torch.nan
    out = linear_logprob(hidden, weight, torch.arange(4))
    assert out.logprob.isnan().tolist() == [False, False, True, False]
    for temperature in (0.0, 1.0):
        drawn = linear_sample(
            hidden, weight, seed=1, position=torch.arange(4), temperature=temperature
        )
        assert drawn.logprob.isnan().tolist() == [False, False, True, False]
        assert int(drawn.token.max()) < 75


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_kernel_runs_on_the_device_of_its_operands():
    hidden, weight = (torch.randn(4, 24).to("cuda:1"), torch.randn(75, 24).to("cuda:1"))
    out = linear_logprob(hidden, weight, torch.arange(4, device="cuda:1"))
    expected = linear_logprob(hidden.cpu(), weight.cpu(), torch.arange(4, device="cpu"))
    torch.testing.assert_close(out.logprob.cpu(), expected.logprob, atol=1e-4, rtol=1e-4)
