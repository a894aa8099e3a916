"""Time and extra memory of every output-layer op, side by side with what else can be run.

    python benchmarks/output_layer.py [--json] [--op OP] [--dtype fp32|bf16] [--size M,D,V] [--all]

M = rows: positions times k = 5 slots. Every op, dtype and size runs in a process of its own;
implementations take turns, and medians are reported: of `--repeats` calls after one that warms up,
or of fewer where a call takes long. Memory is what the peak of one call, results and gradients
included, lies above the memory before it: resident memory on a CPU, the allocator's on a GPU. The
output begins with the measured ceilings of the device (a large matrix product, and a copy) and ends
with the project's targets. Baselines that are not installed (`pip install -e '.[benchmark]'`) or do
not run on this device are named and left out. On a CPU the first size, the large one, is measured
only for the passes that have a target, without the slowest baselines; `--all` measures everything.
A GPU measures everything, the Triton path (`mtp_kernels`) and the torch path included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import (
    Target,
    add_json_option,
    peak_above,
    print_json,
    print_targets,
    reset_peak,
    timed,
)
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import mtp_kernels as mk  # noqa: E402

NUM_SLOTS = 5
SIZES = ("10240,576,49152", "1280,960,49152")
"""Rows, D, V: 2048 and 256 positions of 5 slots, with the output layers of two small models."""
SIZES_GPU = ("10240,576,49152", "16384,4096,128256")
"""The same on a GPU: a small model's output layer, and that of one with 8 billion parameters."""
LARGE_NUMEL = 1 << 28
"""Logits from which on only the passes of GOALS and the quick baselines are measured."""
SLOW = ("torch_linear_cross_entropy", "cut_cross_entropy", "mtp_kernels_logprob")
"""Left out at such sizes."""
CASE_SECONDS = 10.0
"""No further call of a case whose timed calls took this long."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPS = ("linear_loss", "linear_logprob", "linear_kl", "linear_sample", "linear_verify")
DECODE_ROWS = 80
"""Rows of the decoding ops: 16 sequences of 5 slots."""


@dataclass
class Result:
    """One line of the table."""

    op: str
    impl: str
    dtype: str
    rows: int
    D: int
    V: int
    pass_: str
    seconds: float
    extra_bytes: int
    time_over_naive: float | None = None
    memory_over_naive: float | None = None
    time_over_compiled: float | None = None

    def as_json(self) -> dict[str, object]:
        """The fields under their published names."""
        return {("pass" if k == "pass_" else k): v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Goal:
    """Target of an op relative to another implementation."""

    op: str
    pass_: str
    against: str
    seconds: float
    """Maximum of the time relative to the other's."""
    memory: float | None
    """Maximum of the extra memory relative to the other's; None: no target."""


GOALS = (
    Goal("linear_loss", "forward_backward", "naive", 1.0, 1 / 20),
    Goal("linear_logprob", "forward", "compiled_naive", 1.0, 1 / 50),
    Goal("linear_kl", "forward", "mtp_kernels_unshared", 0.7, None),
)


@dataclass
class Case:
    """One implementation of one op and pass, ready to be called."""

    impl: str
    pass_: str
    call: Callable[[], object]


def with_backward(function: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """Forward and backward, the gradients of the last call thrown away first."""

    def call() -> object:
        for leaf in leaves:
            leaf.grad = None
        loss = function()
        loss.backward()
        return loss.detach()

    return call


def entropy_and_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Naive code for both."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def loss_cases(hidden: Tensor, weight: Tensor, target: Tensor) -> list[Case]:
    """Mean cross-entropy, the training default."""

    def naive(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.T).float(), target)

    compiled = torch.compile(naive)
    functions: dict[str, Callable[[], Tensor]] = {
        "naive": lambda: naive(hidden, weight),
        "compiled_naive": lambda: compiled(hidden, weight),
        "mtp_kernels": lambda: mk.linear_loss(hidden, weight, target).loss,
        "mtp_kernels_logprob": lambda: -mk.linear_logprob(hidden, weight, target).logprob.mean(),
        "torch_linear_cross_entropy": lambda: F.linear_cross_entropy(
            hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions()
        ),
    }
    if hidden.is_cuda:
        functions["mtp_kernels_torch"] = lambda: (
            mk.linear_loss(hidden, weight, target, impl="torch").loss
        )
    try:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if hidden.is_cuda else "torch_compile"
        functions["cut_cross_entropy"] = lambda: linear_cross_entropy(
            hidden, weight, target, impl=impl
        )
    except ImportError as error:
        print(f"cut_cross_entropy left out: {error}")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()  # Triton only: left out on a CPU
        functions["liger"] = lambda: liger(weight, hidden, target)
    except ImportError as error:
        print(f"liger_kernel left out: {error}")
    cases = [
        Case(n, "forward_backward", with_backward(f, [hidden, weight]))
        for n, f in functions.items()
    ]
    return cases + [Case(n, "forward", torch.no_grad()(f)) for n, f in functions.items()]


def logprob_cases(hidden: Tensor, weight: Tensor, target: Tensor) -> list[Case]:
    """Log-probability and entropy."""
    compiled = torch.compile(entropy_and_logprob)
    functions: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "naive": lambda: entropy_and_logprob(hidden, weight, target),
        "compiled_naive": lambda: compiled(hidden, weight, target),
        "mtp_kernels": lambda: mk.linear_logprob(hidden, weight, target)[0:3:2],
    }
    if hidden.is_cuda:
        functions["mtp_kernels_torch"] = lambda: mk.linear_logprob(
            hidden, weight, target, impl="torch"
        )[0:3:2]

    def mean(function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], Tensor]:
        return lambda: sum(value.mean() for value in function())  # type: ignore[return-value]

    cases = [Case(n, "forward", torch.no_grad()(f)) for n, f in functions.items()]
    return cases + [
        Case(n, "forward_backward", with_backward(mean(f), [hidden, weight]))
        for n, f in functions.items()
    ]


def kl_cases(hidden: Tensor, weight: Tensor) -> list[Case]:
    """Forward KL of k slots to shared teacher rows, and to a teacher row made for each student."""
    rows, depth = hidden.shape
    positions = rows // NUM_SLOTS
    teacher = torch.randn(positions, depth, dtype=hidden.dtype, device=hidden.device) * 0.5
    fixed = (weight.detach() + 0.01).contiguous()
    shape = (1, positions, NUM_SLOTS, depth)
    index = torch.arange(positions, device=hidden.device)[:, None] + torch.arange(
        NUM_SLOTS, device=hidden.device
    )
    index = torch.where(index < positions, index, 0).reshape(-1)
    apart = teacher[index]
    own = torch.arange(rows, device=hidden.device)

    def naive(h: Tensor, w: Tensor) -> Tensor:
        log_q = (h @ w.T).float().log_softmax(-1)
        log_p = (apart @ fixed.T).float().log_softmax(-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)

    compiled = torch.compile(naive)
    functions: dict[str, Callable[[], Tensor]] = {
        "naive": lambda: naive(hidden, weight).sum(),
        "compiled_naive": lambda: compiled(hidden, weight).sum(),
        "mtp_kernels_unshared": lambda: mk.linear_kl(
            hidden, weight, apart, fixed, index=own
        ).kl.sum(),
        "mtp_kernels": lambda: mk.linear_kl(
            hidden.view(shape), weight, teacher[None], fixed
        ).kl.sum(),
    }
    if hidden.is_cuda:
        functions["mtp_kernels_torch"] = lambda: mk.linear_kl(
            hidden.view(shape), weight, teacher[None], fixed, impl="torch"
        ).kl.sum()
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
        functions["liger_jsd"] = lambda: liger(hidden, weight, apart, fixed, own)
    except ImportError as error:
        print(f"liger_kernel left out: {error}")
    cases = [
        Case(n, "forward", torch.no_grad()(f)) for n, f in functions.items() if n != "liger_jsd"
    ]
    return cases + [
        Case(n, "forward_backward", with_backward(f, [hidden, weight]))
        for n, f in functions.items()
    ]


def sample_cases(hidden: Tensor, weight: Tensor) -> list[Case]:
    """One token and its log-probability per row, at temperature 1."""
    position = torch.arange(hidden.shape[0], device=hidden.device)

    def naive() -> tuple[Tensor, Tensor]:
        log_p = (hidden @ weight.T).float().log_softmax(-1)
        token = torch.multinomial(log_p.exp(), 1)
        return token, log_p.gather(-1, token)

    compiled = torch.compile(naive)
    return [
        Case("naive", "forward", torch.no_grad()(naive)),
        Case("compiled_naive", "forward", torch.no_grad()(compiled)),
        Case(
            "mtp_kernels",
            "forward",
            torch.no_grad()(lambda: mk.linear_sample(hidden, weight, seed=0, position=position)),
        ),
    ]


def verify_cases(hidden: Tensor, weight: Tensor) -> list[Case]:
    """Acceptance of drafts and the token after them."""
    num, depth = hidden.shape[0] // NUM_SLOTS, hidden.shape[1]
    options = {"dtype": hidden.dtype, "device": hidden.device}
    main = hidden.detach().view(num, NUM_SLOTS, depth)
    head = torch.randn(num, NUM_SLOTS - 1, depth, **options) * 0.5
    position = torch.arange(num, device=hidden.device) * 10
    steps = torch.arange(NUM_SLOTS - 1, device=hidden.device)
    draft = mk.linear_sample(
        head, weight.detach(), seed=0, position=position[:, None] + steps
    ).token

    def naive() -> tuple[Tensor, Tensor]:
        p = (main @ weight.T).float().softmax(-1)
        q = (head @ weight.T).float().softmax(-1)
        ratio = p[:, :-1].gather(-1, draft[..., None]) / q.gather(-1, draft[..., None])
        accepted = (torch.rand_like(ratio) < ratio)[..., 0].long().cumprod(-1).sum(-1)
        row = torch.arange(num, device=p.device)
        left = F.pad(q, (0, 0, 0, 1))[row, accepted]
        residual = (p[row, accepted] - left).clamp_min(0) + 1e-30
        return accepted, torch.multinomial(residual, 1)

    return [
        Case("naive", "forward", torch.no_grad()(naive)),
        Case("compiled_naive", "forward", torch.no_grad()(torch.compile(naive))),
        Case(
            "mtp_kernels",
            "forward",
            torch.no_grad()(
                lambda: mk.linear_verify(main, weight, draft, head, seed=0, position=position)
            ),
        ),
    ]


def make_cases(
    op: str, rows: int, depth: int, vocab: int, dtype: torch.dtype
) -> tuple[list[Case], list[Tensor]]:
    """(the implementations of an op on one size, the tensors that get gradients)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # Logits of a trained model's spread: a few nats.
    hidden = (torch.randn(rows, depth, device=device) * 0.5).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, depth, device=device) * 0.1).to(dtype).requires_grad_()
    target = torch.randint(0, vocab, (rows,), device=device)
    makers: dict[str, Callable[[], list[Case]]] = {
        "linear_loss": lambda: loss_cases(hidden, weight, target),
        "linear_logprob": lambda: logprob_cases(hidden, weight, target),
        "linear_kl": lambda: kl_cases(hidden, weight),
        "linear_sample": lambda: sample_cases(hidden, weight),
        "linear_verify": lambda: verify_cases(hidden, weight),
    }
    return makers[op](), [hidden, weight]


def seconds_and_bytes(call: Callable[[], object], leaves: list[Tensor]) -> tuple[float, int]:
    """Wall time of one call, and how far its peak lies above the memory before it."""
    for leaf in leaves:
        leaf.grad = None
    before = reset_peak()
    seconds, _ = timed(call)
    return seconds, peak_above(before)


def wanted(op: str, case: Case, numel: int) -> bool:
    """Whether a case is measured at a size without --all."""
    small = numel < LARGE_NUMEL or op in ("linear_sample", "linear_verify")
    return small or (case.impl not in SLOW and (op, case.pass_) in {(b.op, b.pass_) for b in GOALS})


def measure(op: str, size: str, dtype: str, repeats: int, everything: bool) -> list[Result]:
    """The implementations of an op on one size and dtype."""
    rows, depth, vocab = (int(n) for n in size.split(","))
    if op in ("linear_sample", "linear_verify"):
        rows = min(rows, DECODE_ROWS)
    runnable: list[tuple[Case, list[tuple[float, int]]]] = []
    cases, leaves = make_cases(op, rows, depth, vocab, DTYPES[dtype])
    for case in cases:
        if not everything and not wanted(op, case, rows * vocab):
            continue
        try:
            case.call()
            runnable.append((case, []))
        except Exception as error:  # a baseline that does not run is reported, and left out
            if case.impl.startswith("mtp_kernels"):
                raise
            print(f"{case.impl} {case.pass_} left out: {str(error).splitlines()[0]}", flush=True)
    for _ in range(repeats):
        for case, taken in runnable:
            if sum(seconds for seconds, _ in taken) < CASE_SECONDS:
                taken.append(seconds_and_bytes(case.call, leaves))
    results = []
    for case, taken in runnable:
        seconds = statistics.median(seconds for seconds, _ in taken)
        extra = int(statistics.median(extra for _, extra in taken))
        results.append(Result(op, case.impl, dtype, rows, depth, vocab, case.pass_, seconds, extra))
    for result in results:
        base = {r.impl: r for r in results if r.pass_ == result.pass_}
        if "naive" in base:
            result.time_over_naive = result.seconds / base["naive"].seconds
            result.memory_over_naive = result.extra_bytes / max(1, base["naive"].extra_bytes)
        if "compiled_naive" in base:
            result.time_over_compiled = result.seconds / base["compiled_naive"].seconds
    return results


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s of a copy) of this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 8192 if device == "cuda" else 1536
    a = torch.randn(side, side, device=device).to(dtype)
    block = torch.empty((1 << 30) if device == "cuda" else (1 << 27), device=device)
    target = torch.empty_like(block)
    product = min(timed(lambda: a @ a)[0] for _ in range(5))
    copy = min(timed(lambda: target.copy_(block))[0] for _ in range(3))
    return 2 * side**3 / product, 2 * block.nbytes / copy


def useful_work(result: Result) -> tuple[float, float]:
    """(FLOP, bytes) that the op cannot do without: its products, and its operands once each."""
    product = 2.0 * result.rows * result.D * result.V
    width = 4 if result.dtype == "fp32" else 2
    operand_bytes = width * result.D * (result.V + result.rows)
    products, reads = 1.0, 1.0
    if result.op == "linear_kl":
        products, reads = 1.0 + 1.0 / NUM_SLOTS, 2.0
    elif result.op == "linear_verify":
        products, reads = 2.0, 2.0
    if result.pass_ == "forward_backward":
        products, reads = products + 2.0, reads + 2.0
    return products * product, reads * operand_bytes


def report(results: list[Result], peaks: dict[str, tuple[float, float]]) -> None:
    """Prints the table of one op, dtype and size."""
    first = results[0]
    print(f"\n{first.op}, {first.dtype}, {first.rows} rows, D = {first.D}, V = {first.V}")
    print(
        f"  {'pass':17}{'implementation':27}{'seconds':>9}{'MiB':>7}{'time /':>9}{'memory /':>9}"
        f"{'time /':>10}{'TFLOP/s':>15}{'GB/s':>14}\n"
        f"  {'':60}{'naive':>9}{'naive':>9}{'compiled':>10}{'(of ceiling)':>15}{'':>14}"
    )
    for r in sorted(results, key=lambda r: r.pass_):
        flop, moved = useful_work(r)
        peak_flop, peak_bytes = peaks[r.dtype]
        time_naive, memory_naive, time_compiled = (
            "-" if value is None else f"{value:.3f}"
            for value in (r.time_over_naive, r.memory_over_naive, r.time_over_compiled)
        )
        print(
            f"  {r.pass_:17}{r.impl:27}{r.seconds:9.3g}{r.extra_bytes / 2**20:7.0f}"
            f"{time_naive:>9}{memory_naive:>9}{time_compiled:>10}"
            f"{flop / r.seconds / 1e12:9.3g} ({flop / r.seconds / peak_flop:3.0%})"
            f"{moved / r.seconds / 1e9:8.1f} ({moved / r.seconds / peak_bytes:3.0%})",
            flush=True,
        )


def report_targets(results: list[Result]) -> None:
    """Prints a line for the time and the memory of each goal, dtype and size that was measured."""
    by_key = {(r.op, r.pass_, r.dtype, r.rows, r.D, r.V, r.impl): r for r in results}
    print("\ntargets")
    for goal in GOALS:
        for (*key, impl), ours in by_key.items():
            other = by_key.get((*key, goal.against))
            if (*key[:2], impl) != (goal.op, goal.pass_, "mtp_kernels") or other is None:
                continue
            where = f"{ours.op} {ours.pass_} {ours.dtype} {ours.rows}x{ours.D}x{ours.V}"
            time = ours.seconds / other.seconds
            targets = [Target(f"{where}: time over {goal.against}", goal.seconds, time, True)]
            if goal.memory is not None:
                memory = ours.extra_bytes / max(1, other.extra_bytes)
                name = f"{where}: memory over {goal.against}"
                targets.append(Target(name, goal.memory, memory, True))
            print_targets(targets)


def main() -> None:
    """Runs each op, dtype and size in a process of its own, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_json_option(parser)
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--size", action="append", help="rows,D,V")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="every pass and baseline at every size")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.worker:
        key = (options.op[0], options.size[0], options.dtype[0])
        results = measure(*key, options.repeats, options.all)
        print(json.dumps([asdict(result) for result in results]))
        return
    dtypes = options.dtype or list(DTYPES)
    peaks = {name: ceilings(DTYPES[name]) for name in dtypes}
    for name, (flop, moved) in peaks.items():
        print(f"ceilings {name}: {flop / 1e12:.3f} TFLOP/s, {moved / 1e9:.1f} GB/s", flush=True)
    everything: list[Result] = []
    has_gpu = torch.cuda.is_available()
    for size in options.size or (SIZES_GPU if has_gpu else SIZES):
        for op in options.op or OPS:
            for dtype in dtypes:
                command = [sys.executable, __file__, "--worker", "--op", op, "--dtype", dtype]
                command += ["--size", size, "--repeats", str(options.repeats)]
                command += ["--threads", str(options.threads)] + ["--all"] * (
                    options.all or has_gpu
                )
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                *notes, last = done.stdout.splitlines() or [""]
                print("".join(f"{note}\n" for note in notes), end="")
                if done.returncode:
                    sys.exit(f"{op} {dtype} {size} failed with status {done.returncode}")
                results = [Result(**fields) for fields in json.loads(last)]
                report(results, peaks)
                everything += results
    report_targets(everything)
    print_json(options.json, {"results": [result.as_json() for result in everything]})


if __name__ == "__main__":
    main()
