"""`mtp plan`: memory and time of an RL step on paper.

Imports arithmetic only, so it answers at once.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..plan.memory import (
    PRECISIONS,
    Layout,
    Memory,
    Workload,
    fits,
    memory,
    micro_batch_of,
    most_rollouts,
)
from ..plan.shapes import MAINS, head_for, main_of
from ..plan.time import (
    HEADROOM,
    MACHINES,
    Machine,
    Rates,
    StepTime,
    asynchronous_step,
    layouts,
    step_time,
)

NUMBERS: dict[str, tuple[type, Any, str]] = {
    "slots": (int, 5, "head tokens per pass, K"),
    "rollouts": (int, 1024, "rollouts per step, on all GPUs"),
    "group-size": (int, 8, "rollouts per prompt"),
    "prompt-tokens": (int, 256, "tokens of a prompt"),
    "new-tokens": (int, 2048, "mean tokens of a rollout"),
    "longest": (float, 2.0, "tokens of the longest rollout over the mean"),
    "micro-batch": (int, 8, "rollouts per forward and backward on a GPU; fewer if they do not fit"),
}
"""Options that hold a number: type, default, help."""


@dataclass(frozen=True)
class Plan:
    """The plan for one number of GPUs; `layout` is None if nothing fits."""

    gpus: int
    layout: Layout | None
    load: Workload
    most: int = 0
    """The most rollouts that fit, if these do not."""
    memory: Memory | None = None
    step: StepTime | None = None
    asynchronous: StepTime | None = None


def plan_for(
    load: Workload, gpus: int, machine: Machine, rates: Rates, reduce_each: bool = False
) -> Plan:
    """The layout, micro-batch, memory and times of a load."""
    room = HEADROOM * machine.capacity
    for layout in layouts(gpus, reduce_each):
        fitting = fits(load, layout, room)
        if fitting is not None:
            return Plan(
                gpus,
                layout,
                fitting,
                0,
                memory(fitting, layout),
                step_time(fitting, layout, machine, rates),
                asynchronous_step(fitting, layout, machine, rates),
            )
    return Plan(
        gpus, None, load, max(most_rollouts(load, o, room) for o in layouts(gpus, reduce_each))
    )


def add_plan(commands: Any) -> None:
    """Add the command to those of `mtp`."""
    text = "memory and time of an RL step on paper, for a model on 1 to 1,024 GPUs"
    sub = commands.add_parser("plan", help=text, description=f"{text[0].upper()}{text[1:]}.")
    sub.set_defaults(run=plan)
    sub.add_argument(
        "--main",
        default="8b",
        metavar="NAME",
        help=f"{', '.join(MAINS)}, or a config.json or its folder; default: 8b",
    )
    sub.add_argument("--head", choices=["eavesdrop", "parallel"], default="eavesdrop")
    sub.add_argument("--gpu", choices=list(MACHINES), default="h100", help="default: h100")
    sub.add_argument("--gpus", default="1,8,64,1024", metavar="N,N", help="default: 1,8,64,1024")
    for name, (kind, default, about) in NUMBERS.items():
        sub.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar="N",
            help=f"{about}; default: {default}",
        )
    sub.add_argument(
        "--tokens-per-pass",
        type=float,
        metavar="N",
        help="tokens kept of a pass: 1 in slow mode; default: the whole block, K + 1",
    )
    sub.add_argument("--precision", choices=list(PRECISIONS), default="bf16-mixed")
    sub.add_argument("--gradient-checkpointing", action="store_true")
    sub.add_argument("--no-reference", action="store_true", help="no frozen reference")
    sub.add_argument(
        "--compiled", action="store_true", help="passes in a captured graph, without launches"
    )
    sub.add_argument(
        "--reduce-each",
        action="store_true",
        help="fsdp2 reduces gradients after every micro-batch; built is once per step",
    )
    sub.add_argument("--json", action="store_true", help="print JSON only")


def workload(arguments: argparse.Namespace) -> Workload:
    """The step that the options describe. Raises ValueError naming an impossible option."""
    for name in NUMBERS:
        value = getattr(arguments, name.replace("-", "_"))
        if not 1 <= value < math.inf:
            raise ValueError(f"--{name} must be a number of at least 1, got {value}")
    main = main_of(arguments.main)
    return Workload(
        main,
        head_for(main, arguments.head, arguments.slots),
        rollouts=arguments.rollouts,
        group_size=arguments.group_size,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        longest=arguments.longest,
        tokens_per_pass=arguments.tokens_per_pass,
        micro_batch=arguments.micro_batch,
        precision=arguments.precision,
        gradient_checkpointing=arguments.gradient_checkpointing,
        reference=not arguments.no_reference,
    )


def gpu_counts(text: str, rollouts: int) -> list[int]:
    """The numbers of `--gpus`. Raises ValueError for one that rollouts cannot be divided among."""
    counts = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    bad = [count for count in counts if not 1 <= count <= 100_000]
    if bad:
        raise ValueError(f"--gpus must be numbers between 1 and 100000, got {text!r}")
    if max(counts) > rollouts:
        raise ValueError(
            f"--rollouts must be at least the number of GPUs, {max(counts)}, got {rollouts}; raise "
            "it, or lower --gpus"
        )
    return counts


def plan(arguments: argparse.Namespace) -> None:
    """`mtp plan`."""
    load, machine = workload(arguments), MACHINES[arguments.gpu]
    rates = replace(Rates(), launches_per_layer=0) if arguments.compiled else Rates()
    counts = gpu_counts(arguments.gpus, load.rollouts)
    plans = [plan_for(load, count, machine, rates, arguments.reduce_each) for count in counts]
    if arguments.json:
        print(json.dumps([as_json(one) for one in plans], indent=2))
        return
    main, head = load.main.parameters, load.head.parameters(load.main)
    print(
        f"main {main / 1e9:.2f} B, head {head / 1e6:.0f} M parameters; {load.rollouts} rollouts of "
        f"{load.prompt_tokens} + {load.new_tokens} tokens, {load.kept:g} per pass; {machine.name}"
    )
    print(
        f"assumed: {rates.products:.0%} of {machine.flops / 1e12:g} TFLOP/s in layers, "
        f"{rates.output:.0%} in the output layer, {rates.bandwidth:.0%} of "
        f"{machine.bandwidth / 1e12:g} TB/s, {rates.network:.0%} of links"
    )
    for one in plans:
        print("\n".join(lines(one)))


def lines(one: Plan) -> list[str]:
    """A plan as text."""
    title = f"\n{one.gpus} GPUs" if one.gpus > 1 else "\n1 GPU"
    if one.layout is None or one.memory is None or one.step is None:
        remedy = (
            f"at most {one.most} rollouts do" if one.most else "nor does any number of rollouts"
        )
        return [f"{title}: {one.load.rollouts} rollouts do not fit; {remedy}"]
    layout, load = one.layout, one.load
    how = layout.strategy if one.gpus > 1 else "one device"
    if layout.strategy == "fsdp2":
        how += f", rollout_weights={layout.rollout_weights}"
    how += f", micro-batch {micro_batch_of(load, layout)}"
    how += ", gradient checkpointing" * load.gradient_checkpointing
    out = [f"{title}: {how}"]
    for part, values in vars(one.memory).items():
        found = ", ".join(f"{n} {v / 1e9:.1f}" for n, v in values.items() if v >= 5e7)
        out.append(f"  {part:8} {sum(values.values()) / 1e9:6.1f} GB: {found}")
    step, later = one.step, one.asynchronous
    out.append(
        f"  pass {step.one_pass * 1e3:.1f} ms, rollouts {step.rollouts:.1f} s, training "
        f"{step.training:.1f} s, step {step.step:.1f} s; bound by {step.bound}"
    )
    if later is not None:
        refused = " (rollouts.lag is refused with fsdp2)" * (layout.strategy == "fsdp2")
        out.append(
            f"  asynchronous{refused}: {later.samplers} sample in {later.rollouts:.1f} s, "
            f"{one.gpus - later.samplers} train in {later.training:.1f} s, "
            f"step {later.step:.1f} s; bound by {later.bound}"
        )
    return out


def as_json(one: Plan) -> dict[str, Any]:
    """A plan in numbers: bytes and seconds."""
    found: dict[str, Any] = {"gpus": one.gpus, "fits": one.layout is not None}
    for name in ("layout", "memory", "step", "asynchronous"):
        value = getattr(one, name)
        found[name] = None if value is None else asdict(value)
    found["most_rollouts"] = one.most or None
    found["micro_batch"] = one.load.micro_batch
    found["gradient_checkpointing"] = one.load.gradient_checkpointing
    return found
