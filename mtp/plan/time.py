"""Seconds of a pass, of rollouts and of a step, from FLOPs, bytes and stated utilisation.

    pass       the longest of FLOPs / rate of products, bytes / bandwidth, launches, and gathering
    rollouts   passes of the longest rollout, each at the rows that are still running
    training   FLOPs of replay and its backward, gathered and reduced weights, the optimizer's bytes

A product of n weights with a token is 2n FLOPs; its backward twice as much. Without asynchronous
rollouts a step takes the sum of the two; with them, some devices sample while the others train, and
a step takes the longer of the two and the sending of the weights. Not counted: scoring, tokens that
wait for other rows, and what overlaps within one part.

Shapes as in `memory.py`.
"""

from dataclasses import dataclass, replace

from .memory import PRECISIONS, Layout, Workload, cache_bytes, cache_positions, fits

DEVICES_PER_NODE = 8
HEADROOM = 0.9
"""Share of a device's memory that a plan may use: libraries and fragments take the rest."""


@dataclass(frozen=True)
class Machine:
    """One device, and the network between them."""

    name: str
    flops: float
    """FLOP/s of dense 16-bit products."""
    bandwidth: float
    """Bytes/s of its memory."""
    capacity: float
    """Bytes of its memory."""
    link: float
    """Bytes/s to the devices of the same node, one direction."""
    network: float
    """Bytes/s of each device to other nodes."""
    launch: float
    """Seconds to launch one kernel."""


GB = 1e9
MACHINES = {
    "a100": Machine("A100 80 GB", 312e12, 2.04e12, 80 * GB, 300 * GB, 25 * GB, 5e-6),
    "h100": Machine("H100 SXM", 989e12, 3.35e12, 80 * GB, 450 * GB, 50 * GB, 5e-6),
    "h200": Machine("H200 SXM", 989e12, 4.8e12, 141 * GB, 450 * GB, 50 * GB, 5e-6),
    "b200": Machine("B200", 2250e12, 8.0e12, 180 * GB, 900 * GB, 50 * GB, 5e-6),
}
"""Vendors' numbers, dense; 400 Gbit/s a device between nodes (200 for the A100)."""


@dataclass(frozen=True)
class Rates:
    """Utilisation: shares of a machine's rates that are reached."""

    products: float = 0.45
    """Share of FLOP/s in main's and the head's layers."""
    output: float = 0.5
    """Share of FLOP/s in the output layer."""
    bandwidth: float = 0.7
    """Share of memory bandwidth in decoding."""
    network: float = 0.7
    """Share of links and network."""
    launches_per_layer: int = 10
    """Kernels of one layer of main in a pass, one after the other; 0 for a captured graph."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and what bounds its parts."""

    passes: float
    """Passes of the longest rollout."""
    one_pass: float
    """Seconds of the first pass after the prompt."""
    rollouts: float
    training: float
    step: float
    bound: str
    """The part and the resource that take the most time."""
    samplers: int = 0
    """Devices that sample while the others train; 0: all do both."""


def gathered(load: Workload, layout: Layout) -> float:
    """Bytes of weights that each device receives to have them all once."""
    if layout.shards == 1:
        return 0.0
    size = PRECISIONS[load.precision][1] * load.main.num_layers * load.main.layer_parameters
    return size * (1 - 1 / layout.shards)


def speed(layout: Layout, machine: Machine, rates: Rates) -> float:
    """Bytes/s between devices: of the slowest link of a ring through all of them."""
    link = machine.link if layout.num_devices <= DEVICES_PER_NODE else machine.network
    if layout.num_devices > DEVICES_PER_NODE:
        # The devices of a node send over its network side by side, each another part.
        link = min(machine.link, machine.network * DEVICES_PER_NODE)
    return rates.network * link


def pass_parts(
    load: Workload, layout: Layout, machine: Machine, rates: Rates, rows: float, context: float
) -> dict[str, float]:
    """Seconds of one pass of `rows` texts of `context` tokens on one device, by resource."""
    main, head = load.main, load.head
    narrow = PRECISIONS[load.precision][1]
    width = load.kept
    slots = head.num_slots if load.kept > 1 else 0  # a pass of one token does not run the head
    runs = min(slots, 1) if head.kind == "parallel" else slots
    reads = 1 if head.kind == "parallel" else slots + 1
    products = 2 * rows * width * main.product_parameters
    products += 4 * rows * width * context * main.query_width * main.num_layers
    products += 2 * rows * slots * head.parameters(main)
    output = 2 * rows * (slots + 1) * main.matrix_parameters
    weights = main.product_parameters + reads * main.matrix_parameters
    weights += head.parameters(main) * runs
    moved = narrow * weights + rows * context * cache_bytes(load)
    times = {
        "FLOPs": products / (machine.flops * rates.products)
        + output / (machine.flops * rates.output),
        "memory": moved / (machine.bandwidth * rates.bandwidth),
        "launches": machine.launch * rates.launches_per_layer * main.num_layers,
    }
    if layout.shards > 1 and layout.rollout_weights == "layer":
        times["network"] = gathered(load, layout) / speed(layout, machine, rates)
    return times


def pass_time(parts: dict[str, float]) -> float:
    """Seconds of a pass: those of the resource that takes longest; the others overlap with it."""
    return max(parts.values())


def rollout_parts(
    load: Workload, layout: Layout, machine: Machine, rates: Rates
) -> tuple[dict[str, float], float, float]:
    """(seconds by resource, seconds of one pass, number of passes) of sampling on all devices."""
    rows = -(-load.rollouts // layout.num_devices)
    passes = load.new_tokens * load.longest / load.kept
    middle = load.prompt_tokens + load.new_tokens / 2
    # Rows end one after the other: on average 1 / `longest` of them are still running.
    parts = pass_parts(load, layout, machine, rates, rows / load.longest, middle)
    one = pass_time(parts)
    total = dict.fromkeys(parts, 0.0)
    total[max(parts, key=lambda name: parts[name])] = passes * one
    prompts = -(-rows // load.group_size) * load.prompt_tokens
    total["FLOPs"] += 2 * prompts * load.main.product_parameters / (machine.flops * rates.products)
    if layout.shards > 1 and layout.rollout_weights == "whole":
        total["network"] = gathered(load, layout) / speed(layout, machine, rates)
    return total, one, passes


def training_parts(
    load: Workload, layout: Layout, machine: Machine, rates: Rates
) -> dict[str, float]:
    """Seconds of replay, backward and update, by resource."""
    main, head = load.main, load.head
    wide, narrow = PRECISIONS[load.precision]
    rows = -(-load.rollouts // layout.num_devices)
    tokens, scored = rows * load.text, rows * load.new_tokens
    anchors = scored / load.kept
    forward = 2 * tokens * main.product_parameters
    forward += 2 * tokens * load.text * main.query_width * main.num_layers  # causal: half of 4
    ahead = 2 * anchors * head.num_slots * head.parameters(main)
    products = forward * (4 if load.gradient_checkpointing else 3) + 3 * ahead
    output = 2 * scored * main.matrix_parameters
    outputs = 4 * output  # the forward, its logits again, and two products of the backward
    if load.reference:
        products += forward
        outputs += 4 * output
    parameters = (main.parameters + head.parameters(main)) / layout.shards
    parts = {
        "FLOPs": products / (machine.flops * rates.products)
        + outputs / (machine.flops * rates.output),
        "memory": 7 * wide * parameters / (machine.bandwidth * rates.bandwidth),
        "network": 0.0,
    }
    num_micro = -(-rows // min(load.micro_batch, rows))
    if layout.num_devices > 1:
        whole = main.parameters + head.parameters(main)
        reduced = 4 * whole * (1 - 1 / layout.num_devices)
        gathers = num_micro * 2 * gathered(load, layout)
        if load.reference:  # in float32
            gathers += num_micro * 4 / narrow * gathered(load, layout)
        reductions = reduced if layout.shards > 1 else 2 * reduced
        reductions *= num_micro if layout.reduce_each else 1
        parts["network"] = (gathers + reductions) / speed(layout, machine, rates)
    return parts


def training_time(parts: dict[str, float]) -> float:
    """Seconds: the network overlaps with products, the update with nothing."""
    return max(parts["FLOPs"], parts["network"]) + parts["memory"]


def step_time(load: Workload, layout: Layout, machine: Machine, rates: Rates) -> StepTime:
    """A step in which all devices sample, then all train."""
    sampled, one, passes = rollout_parts(load, layout, machine, rates)
    trained = training_parts(load, layout, machine, rates)
    rollouts, training = sum(sampled.values()), training_time(trained)
    return StepTime(
        passes, one, rollouts, training, rollouts + training,
        bound_of(rollouts, sampled, training, trained),
    )  # fmt: skip


def bound_of(
    rollouts: float, sampled: dict[str, float], training: float, trained: dict[str, float]
) -> str:
    """The longer part, and the resource that takes the most of it."""
    part, parts = ("rollouts", sampled) if rollouts >= training else ("training", trained)
    return f"{part}: {max(parts, key=lambda name: parts[name])}"


def asynchronous_step(
    load: Workload, layout: Layout, machine: Machine, rates: Rates
) -> StepTime | None:
    """The shortest step in which some devices sample the next rollouts while the others train.

    Tries 1/8 to 7/8 of the devices. Those that sample hold weights for products and a cache: whole
    weights if they fit, else shards that are gathered layer by layer. None if nothing fits.
    """
    best = None
    for samplers in sorted({layout.num_devices * eighths // 8 for eighths in range(1, 8)} - {0}):
        training = replace(layout, num_devices=layout.num_devices - samplers)
        sampling = sampler_layout(load, samplers, machine.capacity)
        trained = fits(load, training, HEADROOM * machine.capacity)
        if sampling is None or trained is None:
            continue
        sampled, one, passes = rollout_parts(load, sampling, machine, rates)
        parts = training_parts(trained, training, machine, rates)
        sent = PRECISIONS[load.precision][1] * load.main.parameters / speed(layout, machine, rates)
        rollouts, seconds = sum(sampled.values()), training_time(parts)
        step = max(rollouts, seconds) + sent
        if best is None or step < best.step:
            bound = bound_of(rollouts, sampled, seconds, parts)
            best = StepTime(passes, one, rollouts, seconds, step, bound, samplers)
    return best


def sampler_layout(load: Workload, samplers: int, capacity: float) -> Layout | None:
    """The place of weights on devices that only sample; None if they do not fit."""
    narrow = PRECISIONS[load.precision][1]
    rows = -(-load.rollouts // samplers)
    positions = cache_positions(load.prompt_tokens, load.most + 2 * (load.head.num_slots + 1))
    weights = narrow * (load.main.parameters + load.head.parameters(load.main))
    room = HEADROOM * capacity - rows * positions * cache_bytes(load)
    if weights <= room:
        return Layout(samplers)
    root = narrow * (load.main.root_parameters + 2 * load.main.layer_parameters)
    return Layout(samplers, "fsdp2") if root + weights / samplers <= room else None


def layouts(num_devices: int, reduce_each: bool = False) -> list[Layout]:
    """All layouts, those with the least to gather first: ddp, fsdp2 with whole weights while
    sampling, fsdp2 layer by layer.
    """
    found = [Layout(num_devices)]
    if num_devices > 1:
        found += [Layout(num_devices, "fsdp2", how, reduce_each) for how in ("whole", "layer")]
    return found
