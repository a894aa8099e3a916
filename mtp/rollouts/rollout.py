"""Sampling: completes examples with a policy and returns rollouts with their text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from ..common.bounds import bounded
from ..common.heap import release
from ..modeling.compiled import Compiler
from ..modeling.decode_options import DecodableModel, DecodeOptions
from ..modeling.memory import Memory
from ..modeling.phases import Phase, PhasePlan, check_phases
from ..modeling.records import Decoded, pad
from ..modeling.sampler import Sampler
from ..modeling.segments import SegmentSettings, check_segments, decode_segments
from ..tasks.base import Example
from ..tasks.projects import projects_of
from .prompt_format import PromptFormat


@dataclass(kw_only=True)
class DecodingConfig:
    """Settings of decoding, in rollouts and in evaluations."""

    phases: dict[str, Phase] = field(default_factory=dict)
    """Phases in order. A prompt ends with the delimiter of the first; see `Phase`."""
    segments: SegmentSettings = field(default_factory=SegmentSettings)
    max_new_tokens: int = bounded(64, at_least=1, at_most=10_000_000)
    """Maximum number of new tokens per segment."""
    max_prompt_tokens: int | None = bounded(None, at_least=1)
    """Maximum number of prompt tokens, chat template included; None: all that fits main's
    max_position_embeddings before `max_new_tokens`. Longer problems are dropped and counted."""
    temperature: float = bounded(1.0, at_least=0)
    """Sampling temperature of rollouts. Evaluations are greedy."""
    top_k: int = bounded(0, at_least=0)
    """Number of likeliest tokens that rollouts sample from; 0: all."""
    top_p: float = bounded(1.0, above=0, at_most=1)
    """Total probability of the likeliest tokens that rollouts sample from."""
    system_prompt: str | None = None
    """System prompt of the chat template; None: the template's own."""
    chat_template: bool = True
    """Use the tokenizer's chat template. False: prompts are passed as they are, and the model
    continues their text."""
    compile_passes: bool = False
    """Compile main's passes of rollouts and evaluations, as CUDA graphs on a GPU. It pays where
    launching kernels takes longer than running them: a small main, or few rows."""

    def sampler(self) -> Sampler:
        """The distribution of rollouts. Raises ValueError for impossible settings."""
        if 0 < self.temperature < 1e-3:
            raise ValueError(
                f"decoding.temperature must be 0 (greedy) or at least 0.001, got {self.temperature}"
            )
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(
                "decoding.max_prompt_tokens must be null or at least 1, got "
                f"{self.max_prompt_tokens}"
            )
        check_phases(self.phases, "decoding.phases")
        check_segments(self.segments, self.phases, "decoding")
        self._check_budgets()
        if self.compile_passes and self.segments.max_segments > 1:
            raise ValueError(
                "decoding.compile_passes must be false with several segments, whose numbers of "
                "rows would each be compiled, got decoding.segments.max_segments="
                f"{self.segments.max_segments}; set one of the two"
            )
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError(
                "decoding.system_prompt needs decoding.chat_template=true, which makes it part of "
                f"the prompt, got {self.system_prompt!r} with false; set it to null"
            )
        try:
            return Sampler(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        except ValueError as error:
            raise ValueError(f"decoding.{error}") from None

    def compiler(self) -> Compiler | None:
        """The compiler of rollouts and evaluations."""
        return Compiler() if self.compile_passes else None

    def prompt_limit(self, positions: int | None) -> int | None:
        """Maximum number of prompt tokens of a model with this many positions; None: no limit.

        Raises ValueError naming the key if there is no room for a prompt, or not for such a long
        one.
        """
        if positions is None:
            return self.max_prompt_tokens
        room = positions - self.max_new_tokens
        if self.segments.max_segments > 1:  # a later segment's context adds memory and thought
            room -= self.segments.memory_tokens + self.segments.recent_tokens + 3
        if room < 1:
            raise ValueError(
                f"decoding.max_new_tokens must leave room for a prompt, got {self.max_new_tokens} "
                f"with the model's max_position_embeddings={positions}; lower it"
            )
        if self.max_prompt_tokens is not None and self.max_prompt_tokens > room:
            raise ValueError(
                f"decoding.max_prompt_tokens must be at most {room}, which the model's "
                f"max_position_embeddings={positions} leave before "
                f"max_new_tokens={self.max_new_tokens}, got {self.max_prompt_tokens}"
            )
        return room if self.max_prompt_tokens is None else self.max_prompt_tokens

    def _check_budgets(self) -> None:
        """Raises ValueError if a segment ends before its thought and summary are used up."""
        names = list(self.phases)
        closing = [name for name in names if self.phases[name].closed_by is not None]
        if self.segments.max_segments == 1 or not closing:
            return
        budgets = [self.phases[name].max_tokens or 0 for name in (names[0], closing[0])]
        if sum(budgets) + 2 > self.max_new_tokens:
            raise ValueError(
                f"decoding.max_new_tokens must be at least {sum(budgets) + 2}, the max_tokens of "
                f"decoding.phases.{names[0]} and {closing[0]} and their delimiters, got "
                f"{self.max_new_tokens}"
            )


def pass_starts(slots: list[int], accepted: list[int]) -> list[int]:
    """Tokens with which a pass begins.

    A pass of fast or slow mode begins with main's token. A pass of verified mode ends with it: the
    drafts that main accepted come first, and a delimiter among them does not end the pass.
    """
    return [at for at, slot in enumerate(slots) if at == 0 or (slot == 0 and not accepted[at - 1])]


@dataclass
class Rollouts:
    """P prompts times G trajectories; trajectory i belongs to example i // G.

    A trajectory is one or several segments, each a separate text; S counts the segments of all
    trajectories. Segments of one trajectory are adjacent.
    """

    examples: list[Example]
    """[P] examples."""
    group_size: int
    """Number of trajectories per prompt, G."""
    prompts: list[list[int]]
    """[S] ids of the context that each segment continues."""
    out: Decoded
    """Output of the segments, on the CPU, [S] rows."""
    owners: list[int] = field(default_factory=list)
    """[S] the trajectory of each segment; if empty: one segment each."""
    memories: list[Memory] = field(default_factory=list)
    """[S] the memory file after each segment; if empty: no memory in any."""

    def __post_init__(self) -> None:
        self.owners = self.owners or list(range(len(self.prompts)))
        self.memories = self.memories or [Memory()] * len(self.prompts)
        self._segments: list[list[int]] = [[] for _ in range(len(self))]
        for segment, owner in enumerate(self.owners):
            self._segments[owner].append(segment)

    def __len__(self) -> int:
        """P * G trajectories."""
        return len(self.examples) * self.group_size

    def of_examples(self, numbers: Sequence[int]) -> "Rollouts":
        """The rollouts of the chosen examples, in their order."""
        size = self.group_size
        rows = [number * size + row for number in numbers for row in range(size)]
        segments = [self.segments_of(row) for row in rows]
        flat = [segment for mine in segments for segment in mine]
        return Rollouts(
            [self.examples[number] for number in numbers],
            size,
            [self.prompts[segment] for segment in flat],
            self.out.select(flat),
            [row for row, mine in enumerate(segments) for _ in mine],
            [self.memories[segment] for segment in flat],
        )

    def segments_of(self, row: int) -> list[int]:
        """Segments of one trajectory, in order."""
        return self._segments[row]

    @property
    def last(self) -> list[int]:
        """[P * G] the segment in which each trajectory ended."""
        return [segments[-1] for segments in self._segments]

    def completions(self, row: int) -> list[list[int]]:
        """Ids of each segment of one trajectory."""
        return [self.out.completion(segment) for segment in self.segments_of(row)]

    def completion(self, row: int) -> list[int]:
        """Ids of a trajectory's last segment, which has its answer."""
        return self.out.completion(self.segments_of(row)[-1])

    def example(self, row: int) -> Example:
        """The problem of one trajectory."""
        return self.examples[row // self.group_size]

    def pass_starts(self, segment: int) -> list[int]:
        """Tokens of a segment with which a pass begins."""
        length = int(self.out.lengths[segment])
        slots, accepted = (
            x[segment, :length].tolist() for x in (self.out.slots, self.out.accepted)
        )
        return pass_starts(slots, accepted)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over each trajectory's segments: [S] -> [P * G], float32."""
        owners = torch.tensor(self.owners)
        return torch.zeros(len(self)).index_add(0, owners, values.float())


def join_rollouts(parts: list[Rollouts]) -> Rollouts:
    """Rollouts of several rounds as one."""
    if len(parts) == 1:
        return parts[0]
    begins = [sum(map(len, parts[:number])) for number in range(len(parts))]
    return Rollouts(
        [example for part in parts for example in part.examples],
        parts[0].group_size,
        [prompt for part in parts for prompt in part.prompts],
        Decoded.join([part.out for part in parts], pad_id=0),
        [begin + i for begin, part in zip(begins, parts, strict=True) for i in part.owners],
        [memory for part in parts for memory in part.memories],
    )


@contextmanager
def keep_casts(model: DecodableModel) -> Iterator[None]:
    """Context in which autocast casts a frozen weight once, instead of in every pass.

    Autocast's cache keeps the casts only of weights that require a gradient, until it is left. So
    frozen weights are marked as requiring one for that time.
    """
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def sample(
    model: DecodableModel,
    fmt: PromptFormat,
    examples: list[Example],
    plan: PhasePlan,
    options: DecodeOptions,
    *,
    group_size: int = 1,
    prefixes: list[list[int]] | None = None,
) -> Rollouts:
    """Complete each example's prompt `group_size` times, in segments if `fmt` has them.

    `prefixes`, one per example, follow the prompts, as text that the model has written, and count
    as part of `options.max_new_tokens`. Rows are padded with the id of `fmt`, whatever
    `options.pad_id` is.

    With a shared memory `examples` are whole projects. Round r completes the r-th problem of each;
    trajectory g of it begins with the memory of trajectory g of the problem before.

    Raises ValueError for examples that are not whole projects there, and for prefixes.
    """
    if not fmt.segments.is_shared:
        return _sample(model, fmt, examples, plan, options, group_size, prefixes=prefixes)
    if prefixes is not None:
        raise ValueError(
            "a thought that is given writes no memory for the next problem; measure it with "
            "decoding.segments.memory_scope=problem"
        )
    size = projects_of(examples)
    parts, order = [], []
    memories = None
    for place in range(size):
        chosen = list(range(place, len(examples), size))
        rows = [i * group_size + row for i in chosen for row in range(group_size)]
        seeds = None if options.seeds is None else options.seeds[rows]
        part = _sample(
            model,
            fmt,
            [examples[i] for i in chosen],
            plan,
            replace(options, seeds=seeds),
            group_size,
            memories=memories,
        )
        memories = [part.memories[segment].passed_on() for segment in part.last]
        parts.append(part)
        order += chosen
    return join_rollouts(parts).of_examples([order.index(i) for i in range(len(examples))])


def _sample(
    model: DecodableModel,
    fmt: PromptFormat,
    examples: list[Example],
    plan: PhasePlan,
    options: DecodeOptions,
    group_size: int,
    *,
    prefixes: list[list[int]] | None = None,
    memories: list[Memory] | None = None,
) -> Rollouts:
    """`sample` of problems that do not depend on each other; memories: as in `decode_segments`."""
    prompts = [fmt.question_ids(example) for example in examples]
    if prefixes is not None:
        prompts = [p + prefix for p, prefix in zip(prompts, prefixes, strict=True)]
        left = [max(0, options.max_new_tokens - len(prefix)) for prefix in prefixes]
        options = replace(options, limits=torch.tensor(left).repeat_interleave(group_size))
    device = next(model.parameters()).device
    tokens, lengths = pad(prompts, fmt.pad_id)
    training = model.training
    model.train(False)
    with keep_casts(model):
        out = decode_segments(
            model,
            tokens.to(device),
            lengths.to(device),
            plan,
            replace(options, pad_id=fmt.pad_id),
            fmt.segments,
            fmt.tokenizer,
            num_return_sequences=group_size,
            memories=memories,
        )
    model.train(training)
    if device.type == "cpu":
        release()  # what the cache has left: the next to come are replays, with other sizes
    record = out.out.to("cpu")
    return Rollouts(examples, group_size, out.prompts, record, out.owners, out.memories)
