"""Bytes on one device of an RL step, by component, in its three parts.

A step samples rollouts, replays them with gradients in micro-batches, and updates the weights:

    rollouts   weights, casts of them, cache
    replay     weights, casts, gradients of earlier micro-batches, activations, output layer
    update     weights, gradients

each beside the optimizer's states and the frozen reference. The largest of the three is the peak.
Activations are the tensors that autograd keeps, counted from the forward of Llama and of the head.
Not counted: the process itself, with its imports and libraries; memory that an allocator holds
without using it; and the small tensors of a pass.

Shapes as in `shapes.py`; T tokens of a text, K head slots.
"""

from dataclasses import dataclass, replace

from .shapes import HeadShape, MainShape

PRECISIONS = {"32-true": (4, 4), "bf16-mixed": (4, 2), "bf16-true": (2, 2)}
"""Bytes of a weight, and of an operand of a product."""
CPU_CHUNK, GPU_CHUNK, GPU_CHUNK_MOST = 48 << 20, 512 << 20, 4 << 30
"""Working memory of the output layer, see `mtp_kernels/dispatch.py`."""
DIRECT = 1 << 23
"""Logits up to which a CPU keeps all of them, with what autograd needs."""


@dataclass(frozen=True)
class Workload:
    """The work of one step, over all devices."""

    main: MainShape
    head: HeadShape
    rollouts: int = 512
    """Rollouts per step."""
    group_size: int = 8
    """Rollouts per prompt."""
    prompt_tokens: int = 256
    """Tokens of a prompt."""
    new_tokens: int = 2048
    """Mean tokens of a rollout."""
    longest: float = 1.0
    """Tokens of the longest rollout over the mean: the last of a batch decides when it ends."""
    tokens_per_pass: float | None = None
    """Tokens kept of a pass; None: all of a block, K + 1."""
    micro_batch: int = 8
    """Rollouts per forward and backward on one device."""
    precision: str = "bf16-mixed"
    gradient_checkpointing: bool = False
    reference: bool = True
    """True if the loss compares with a frozen model."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        block = self.head.num_slots + 1
        if self.tokens_per_pass is not None and not 1 <= self.tokens_per_pass <= block:
            raise ValueError(
                f"tokens_per_pass must be between 1 and {block}, the block, got "
                f"{self.tokens_per_pass}"
            )

    @property
    def kept(self) -> float:
        """Tokens kept of a pass."""
        return self.tokens_per_pass or self.head.num_slots + 1.0

    @property
    def text(self) -> float:
        """T, of a text of mean length."""
        return self.prompt_tokens + self.new_tokens

    @property
    def most(self) -> int:
        """Positions of the longest text."""
        return self.prompt_tokens + int(self.longest * self.new_tokens)


@dataclass(frozen=True)
class Layout:
    """The place of weights on devices."""

    num_devices: int = 1
    strategy: str = "ddp"
    """`ddp` or `fsdp2`."""
    rollout_weights: str = "layer"
    """Under fsdp2: `layer` or `whole`."""
    reduce_each: bool = False
    """Under fsdp2: reduce gradients after every micro-batch. False, as built: once per step, so
    that each device holds whole gradients between micro-batches."""
    is_cpu: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in ("ddp", "fsdp2"):
            raise ValueError(f"strategy must be ddp or fsdp2, got {self.strategy!r}")

    @property
    def shards(self) -> int:
        """Parts into which weights, gradients and optimizer states are divided."""
        return self.num_devices if self.strategy == "fsdp2" else 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by component, in each part of a step."""

    rollouts: dict[str, float]
    replay: dict[str, float]
    update: dict[str, float]

    def totals(self) -> dict[str, float]:
        """Bytes of each part."""
        return {part: sum(values.values()) for part, values in vars(self).items()}

    @property
    def peak(self) -> float:
        """The largest."""
        return max(self.totals().values())


def layer_activations(main: MainShape, precision: str) -> int:
    """Bytes per token that autograd keeps of one layer of main.

    Residual stream and normed rows are of the weights' dtype, twice each. Under autocast each of
    five products casts its rows anew; without it, products that read the same rows share them.
    """
    wide, narrow = PRECISIONS[precision]
    width, heads = main.width, main.num_heads
    products = 2 * main.query_width + 2 * main.key_width + 4 * main.inner
    rows = 2 * width if wide == narrow else 5 * width
    # In bfloat16 a norm computes in float32 and keeps what it computed with.
    norms = 4 * width * wide if wide == 4 else 2 * width * (wide + 4)
    return norms + narrow * (rows + products) + 4 * (heads + 2)


def head_activations(main: MainShape, head: HeadShape, precision: str) -> float:
    """Bytes per anchor that autograd keeps of the head and of the taps that it reads."""
    wide, narrow = PRECISIONS[precision]
    cast = 0 if wide == narrow else narrow
    slots, width = head.num_slots, head.width
    taps = head.num_taps * main.width * (2 * wide + cast)
    if head.kind == "parallel":
        return taps + slots * width * (2 * wide + 2 * narrow)
    layer = 4 * width * wide + narrow * (6 * width + 4 * head.inner + head.num_heads * slots)
    ends = main.width * (wide + narrow) + 2 * width * wide + width * narrow
    return taps + slots * (ends + head.num_layers * layer)


def cache_bytes(load: Workload) -> int:
    """Bytes of keys and values per position of a text."""
    return 2 * load.main.key_width * load.main.num_layers * PRECISIONS[load.precision][1]


def cache_positions(prompt: int, most: int) -> int:
    """Positions that the cache holds at the end: it doubles when it is full, up to `most`."""
    size = prompt
    while size < most:
        size = min(2 * size, most)
    return size


def output_layer(load: Workload, rows: float, is_cpu: bool) -> float:
    """Bytes of the output layer's forward and backward over `rows` scored tokens.

    With a reference: those of `policy` and `reference_kl`, whose gradients of the matrix are added.
    """
    wide, narrow = PRECISIONS[load.precision]
    main = load.main
    matrix, width = main.matrix_parameters, main.width
    # Main's rows and the head's are gathered and concatenated, then cast; each has a gradient.
    hidden = rows * width * (2 * wide + (narrow if wide != narrow else 0) + narrow + wide)
    gradient = 4 * matrix + (narrow * matrix if narrow != 4 else 0)
    if load.reference:
        # The divergence of each emitter gathers its rows and the reference's, and casts them and
        # both matrices.
        hidden += rows * width * (2 * wide + (2 * narrow if wide != narrow else 0) + wide)
        gradient += 4 * matrix + (4 * narrow * matrix if wide != narrow else 0)
    logits = rows * main.vocab * 4
    if is_cpu:
        chunk = min(logits, CPU_CHUNK)
        if narrow == 4 and rows * main.vocab <= DIRECT:
            chunk = 6 * logits
    else:
        most = max(GPU_CHUNK, min(4 * matrix, GPU_CHUNK_MOST))
        chunk = min(logits, most) * (1 + narrow / 4)
    return hidden + gradient + chunk


def micro_batch_of(load: Workload, layout: Layout) -> int:
    """Rollouts of a device that are replayed at once."""
    return min(load.micro_batch, -(-load.rollouts // layout.num_devices))


def memory(load: Workload, layout: Layout) -> Memory:
    """Bytes on each device."""
    wide, narrow = PRECISIONS[load.precision]
    main, head, shards = load.main, load.head, layout.shards
    rows = -(-load.rollouts // layout.num_devices)
    micro = micro_batch_of(load, layout)
    num_main, num_head = main.parameters, head.parameters(main)
    held = {
        "main": wide * num_main / shards,
        "head": wide * num_head / shards,
        "optimizer": 2 * wide * (num_main + num_head) / shards,
        "reference": 4 * num_main / shards if load.reference else 0.0,
    }
    gradients = wide * (num_main + num_head) / shards
    is_first = micro >= rows
    between = 0.0 if is_first else gradients
    if layout.strategy == "ddp" and layout.num_devices > 1:
        # The gradients are in the reducer's buckets in the end, and those are never freed.
        held["buckets"], gradients = gradients, 0.0
    if shards > 1 and not (is_first or layout.reduce_each):
        between = 4.0 * (num_main + num_head)

    # Copies of weights that products read: autocast's, or the gathered ones of shards.
    mixed = load.precision == "bf16-mixed"
    products = main.num_layers * main.layer_parameters + main.matrix_parameters + num_head
    casts = float(narrow * products) if mixed else 0.0
    if shards > 1:
        root = main.root_parameters + num_head
        layers = narrow * main.layer_parameters
        casts = wide * root + (narrow * root if mixed else 0) + 2 * layers
        sampling: float = casts
        if layout.rollout_weights == "whole":
            sampling = casts + layers * main.num_layers
    else:
        sampling = casts

    positions = cache_positions(load.prompt_tokens, load.most + 2 * (head.num_slots + 1))
    cache = float(rows * positions * cache_bytes(load))
    # One layer's keys grow at a time: for a moment the shorter ones are there, too.
    cache += cache / (4 * main.num_layers)
    prefill = -(-rows // load.group_size) * load.prompt_tokens
    pass_rows = max(prefill, rows * (head.num_slots + 1))
    transient = pass_rows * (3 * main.inner * narrow + 4 * main.width * wide)
    rollouts = held | {"casts": sampling, "cache": cache, "pass": float(transient)}

    tokens, scored = micro * load.text, micro * load.new_tokens
    anchors = scored / load.kept
    kept = float(layer_activations(main, load.precision) * main.num_layers)
    if load.gradient_checkpointing:
        kept = wide * main.width * main.num_layers + layer_activations(main, load.precision)
    ends = main.width * wide * (2 + head.num_taps)
    taken = tokens * (kept + ends) + anchors * head_activations(main, head, load.precision)
    replay = held | {
        "casts": casts,
        "gradients": between,
        "activations": taken,
        "output layer": output_layer(load, scored, layout.is_cpu),
    }
    if load.reference:
        replay["reference's rows"] = 4 * tokens * main.width
        if shards > 1:
            replay["reference's root"] = 4 * main.root_parameters
    update = held | {"gradients": gradients}
    return Memory(rollouts, replay, update)


def most_rollouts(load: Workload, layout: Layout, capacity: float) -> int:
    """The most rollouts of a step that fit, a power of two per device; 0 if not even one does."""
    number = layout.num_devices << 16
    while number >= layout.num_devices:
        if fits(replace(load, rollouts=number), layout, capacity) is not None:
            return number
        number //= 2
    return 0


def fits(load: Workload, layout: Layout, capacity: float) -> "Workload | None":
    """The load in the largest micro-batches that fit, or with gradient checkpointing; else None."""
    for checkpointing in dict.fromkeys((load.gradient_checkpointing, True)):
        micro = load.micro_batch
        while micro:
            tried = replace(load, micro_batch=micro, gradient_checkpointing=checkpointing)
            if memory(tried, layout).peak <= capacity:
                return tried
            micro //= 2
    return None
