"""Predictions of `mtp plan` beside measurements here: peak memory and time of an RL step.

    python benchmarks/plan.py [--json] [--case NAME ...]

Each case is a main of random weights with a head. A step samples rollouts
of one length, replays them in micro-batches and updates the weights; the second step is measured,
when the optimizer has its states. Memory is that of tensors: what the process holds, without what
it holds beside weights and optimizer states between the two steps. On a CPU each tensor has pages
of its own (MALLOC_MMAP_THRESHOLD_), so that what is free is not counted. Time is predicted from the
rate of a matrix product and of a copy, measured here as well.
"""

import argparse
import copy
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from measure import (  # noqa: E402
    Target,
    add_json_option,
    median_seconds,
    peak_above,
    print_json,
    print_targets,
    reset_peak,
    timed,
)

from mtp.plan.memory import Layout, Workload, memory  # noqa: E402
from mtp.plan.shapes import HeadShape, llama  # noqa: E402
from mtp.plan.time import Machine, Rates, step_time  # noqa: E402
from mtp.training.precision import cast_weights  # noqa: E402

SMALL = llama(256, 704, 8, 4, 2, 4096, True)
WIDE = llama(512, 1536, 4, 8, 8, 8192, False)
HEAD = HeadShape("eavesdrop", 5, 256, 1, 704, 4)
BASE = Workload(
    SMALL, HEAD, rollouts=8, group_size=4, prompt_tokens=32, new_tokens=96, micro_batch=4,
    precision="32-true", reference=False,
)  # fmt: skip
CASES = {
    "small": BASE,
    "small, mixed": replace(BASE, precision="bf16-mixed"),
    "small, checkpointing": replace(BASE, gradient_checkpointing=True),
    "small, long texts": replace(BASE, new_tokens=384, micro_batch=2),
    "wide, parallel head": replace(BASE, main=WIDE, head=replace(HEAD, kind="parallel")),
    "wide, mixed": replace(BASE, main=WIDE, precision="bf16-mixed"),
    "small, reference": replace(BASE, reference=True),
    "wide, mixed, reference": replace(BASE, main=WIDE, precision="bf16-mixed", reference=True),
    "wide, cache": replace(BASE, main=WIDE, rollouts=64, group_size=16, micro_batch=1),
}
TOLERANCE = 0.15
"""Largest relative error of a predicted peak."""


def measured(load: Workload) -> dict[str, float]:
    """Peak bytes of tensors in the second step, and its seconds."""
    import torch
    from lightning.fabric import Fabric
    from transformers import LlamaConfig

    from mtp.modeling.decode import decode
    from mtp.modeling.decode_options import DecodeOptions
    from mtp.modeling.heads import HeadConfig
    from mtp.modeling.modeling_mtp import family_class
    from mtp.modeling.phases import PhasePlan
    from mtp.modeling.sampler import Sampler
    from mtp.modeling.versions import set_activation_checkpointing
    from mtp.training.collate import collate_rollouts
    from mtp.training.objectives import ObjectiveConfig
    from mtp.training.objectives.policy import Policy
    from mtp.training.optimizers import OptimizerConfig, build_optimizer, split_parameters
    from mtp.training.step_module import within, wrap
    from mtp.training.update import update

    main, head = load.main, load.head
    config = LlamaConfig(
        **main.fields,
        max_position_embeddings=load.most + 64,
    )
    config.mtp = HeadConfig(**head.fields).to_checkpoint()
    torch.manual_seed(0)
    rates = rates_here(load.precision)
    before = 0
    model: Any = family_class("llama")(config)
    set_activation_checkpointing(model, load.gradient_checkpointing)
    frozen = copy.deepcopy(model).requires_grad_(False).eval() if load.reference else None
    in_bfloat16 = load.precision == "bf16-true"
    fabric = Fabric(
        accelerator="auto", devices=1, precision="32-true" if in_bfloat16 else load.precision
    )
    if in_bfloat16:
        cast_weights(model, torch.bfloat16)
    model.to(fabric.device)
    if frozen is not None:
        frozen.to(fabric.device)
    objective = ObjectiveConfig(policy=Policy(weight=1.0))
    objective.reference_kl.weight = float(load.reference)
    optimizers = {
        part: build_optimizer(parameters, OptimizerConfig(lr=1e-5))
        for part, parameters in split_parameters(model).items()
    }
    module = wrap(fabric, model)
    optimizers = {part: fabric.setup_optimizers(o) for part, o in optimizers.items()}
    counted = sum(p.numel() for p in model.parameters())
    prompts = torch.randint(main.vocab, (load.rollouts // load.group_size, load.prompt_tokens))
    lengths = torch.full((len(prompts),), load.prompt_tokens)
    plan = PhasePlan([head.num_slots + 1], [None])
    options = DecodeOptions(sampler=Sampler(), max_new_tokens=load.new_tokens, impl="auto")
    found: dict[str, float] = {}
    for turn in range(2):
        model.eval()

        def sample(policy: Any) -> Any:
            return decode(
                policy,
                prompts.to(fabric.device),
                lengths.to(fabric.device),
                plan,
                options,
                num_return_sequences=load.group_size,
            ).to("cpu")

        reset_peak()
        sampling, out = timed(lambda: within(module, sample))  # noqa: B023
        found["rollouts"] = peak_above(before)
        model.train()
        # The first update gives the optimizers their states.
        last = load.rollouts if turn else load.micro_batch
        batches = [
            collate_rollouts(
                [row for row in prompts.tolist() for _ in range(load.group_size)],
                out,
                torch.randn(load.rollouts),
                list(range(at, at + load.micro_batch)),
                head.num_slots + 1,
                0,
            ).to(fabric.device)
            for at in range(0, last, load.micro_batch)
        ]
        reset_peak()
        training, _ = timed(
            lambda: update(
                fabric,
                module,
                optimizers,
                batches,  # noqa: B023
                objective,
                clip_norms={"main": 1.0, "head": 1.0},
                sampler=Sampler(),
                reference=frozen,
            )
        )
        found["update"] = peak_above(before)
        if not turn:
            del out, batches
            states = [s for o in optimizers.values() for v in o.state.values() for s in v.values()]
            weights = [*model.parameters(), *(() if frozen is None else frozen.parameters())]
            held = sum(t.nbytes for t in [*weights, *states])
            before = reset_peak() - held
    return {**found, "parameters": counted, "sampling": sampling, "training": training, **rates}


def rates_here(precision: str) -> dict[str, float]:
    """FLOP/s of a matrix product and bytes/s of a copy on this device."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    side = 8192 if device == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    block = torch.empty(1 << 26, device=device)
    target = torch.empty_like(block)
    product = median_seconds(lambda: a @ a, 5)
    copy = median_seconds(lambda: target.copy_(block), 3)
    return {"flops": 2 * side**3 / product, "bandwidth": 2 * block.nbytes / copy}


def compare(name: str, load: Workload, found: dict[str, float]) -> dict[str, Any]:
    """Predictions beside measurements."""
    import torch

    is_cpu = not torch.cuda.is_available()
    planned = memory(load, Layout(is_cpu=is_cpu)).totals()
    machine = Machine("here", found["flops"], found["bandwidth"], float("inf"), 0.0, 0.0, 0.0)
    rates = Rates(products=1.0, output=1.0, bandwidth=1.0)
    times = step_time(load, Layout(is_cpu=is_cpu), machine, rates)
    return {
        "case": name,
        "parameters": load.main.parameters + load.head.parameters(load.main),
        "parameters_measured": found["parameters"],
        "rollouts": planned["rollouts"],
        "rollouts_measured": found["rollouts"],
        "update": max(planned["replay"], planned["update"]),
        "update_measured": found["update"],
        "peak": max(planned.values()),
        "peak_measured": max(found["rollouts"], found["update"]),
        "sampling_seconds": times.rollouts,
        "sampling_seconds_measured": found["sampling"],
        "training_seconds": times.training,
        "training_seconds_measured": found["training"],
    }


def show(row: dict[str, Any]) -> None:
    """A case as text: predicted, measured and their ratio."""
    print(row["case"])
    for key in ("rollouts", "update", "peak"):
        ours, theirs = row[key] / 2**20, row[f"{key}_measured"] / 2**20
        print(f"  {key:9} {ours:7.0f} MiB predicted, {theirs:7.0f} measured, {ours / theirs:.2f}")
    for key in ("sampling_seconds", "training_seconds"):
        ours, theirs = row[key], row[f"{key}_measured"]
        print(f"  {key[:8]}  {ours:7.2f} s at the machine's rates, {theirs:7.2f} measured, "
              f"{ours / theirs:.2f} of them reached")  # fmt: skip


def main() -> None:
    """Runs each case and prints predictions beside measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_json_option(parser)
    parser.add_argument("--case", action="append", choices=CASES)
    options = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # read when a process starts
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    rows, targets = [], []
    for name in options.case or CASES:
        print(f"{name}: two steps", file=sys.stderr, flush=True)
        rows.append(compare(name, CASES[name], measured(CASES[name])))
        if not options.json:
            show(rows[-1])
        error = abs(rows[-1]["peak"] / rows[-1]["peak_measured"] - 1)
        targets.append(Target(f"error of the peak, {name}", TOLERANCE, error, at_most=True))
    if not options.json:
        print_targets(targets)
    print_json(options.json, {"results": rows})


if __name__ == "__main__":
    main()
