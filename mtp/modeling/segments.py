"""Trajectories of several segments: think, summarize into a memory file, continue with that.

A segment is one run of the pass loop with its own context. Where a phase has a `closed_by` token
(the summary, as in `<summary> ... </summary>`), that token ends the segment. The commands in the
summary edit the trajectory's memory file (`memory.py`), and the next segment continues

    prompt <summary> memory </summary> <think> recent tokens

with the prompt as given, the memory after the edits and the last tokens of the thought so far. All
other tokens are dropped, so a context is bounded however long the thought is. A phase's
`max_tokens` closes a thought, or a summary, that is too long. In the last segment budgets lead to
the answer and no token closes the segment.

A trajectory may begin with a memory: that of an earlier problem (`memories`), or that of a
`memory_file` on disk, which all trajectories read and edit (`memory_file.py`). Then the first
context holds it too, as a later one does.

Without such a file, a segment's context is a function of the initial memory and of the tokens of
the segments before it. Hence the log-probability of a trajectory is the sum over its segments',
and replay reads each segment as a separate text.

Ships with checkpoints: imports torch and siblings only.

Shapes: B trajectories, S segments of all of them, L tokens of a segment, T prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .decode import decode, idle
from .decode_options import DecodableModel, DecodeOptions
from .memory import Memory
from .memory_file import MemoryFile
from .phases import Phase, PhasePlan
from .records import Block, Decoded, pad
from .sampler import SEGMENT, mix


@dataclass(kw_only=True)
class SegmentSettings:
    """Settings of a trajectory's segments. Their budgets are those of the phases."""

    max_segments: int = field(default=1, metadata={"at_least": 1, "at_most": 1_000_000})
    """Maximum number of segments of a trajectory. 1: no token closes a segment."""
    recent_tokens: int = field(default=16, metadata={"at_least": 0})
    """Number of last tokens of the thought that the next segment's context keeps."""
    memory_tokens: int = field(default=64, metadata={"at_least": 0})
    """Maximum number of tokens of the memory file; a write beyond them is ignored."""
    memory_scope: str = "problem"
    """Problems that share a memory. `problem`: none, each begins with an empty one. `shared`: those
    of a project, solved in order, in rollouts, evaluations and solved text: each begins with the
    memory that the one before left, without its progress line `done`."""

    @property
    def is_shared(self) -> bool:
        """True if the problems of a project share a memory."""
        return self.memory_scope == "shared"

    def saved(self) -> dict[str, Any]:
        """The settings as a checkpoint keeps them; the usual scope is left out."""
        found = asdict(self)
        if not self.is_shared:
            del found["memory_scope"]
        return found


def check_segments(
    settings: SegmentSettings, phases: dict[str, Phase], where: str, prefix: str = ""
) -> None:
    """Raises ValueError for settings that no trajectory can follow.

    Their keys are `<where>.<prefix>segments` and `<where>.<prefix>phases`.
    """
    key, of_phases = f"{where}.{prefix}segments", f"{where}.{prefix}phases"
    if settings.max_segments < 1:
        raise ValueError(f"{key}.max_segments must be at least 1, got {settings.max_segments}")
    for name in ("recent_tokens", "memory_tokens"):
        if getattr(settings, name) < 0:
            raise ValueError(f"{key}.{name} must be 0 or above, got {getattr(settings, name)}")
    if settings.memory_scope not in ("problem", "shared"):
        raise ValueError(
            f"{key}.memory_scope must be problem or shared, got {settings.memory_scope!r}"
        )
    if settings.is_shared and settings.max_segments == 1:
        raise ValueError(
            f"{key}.max_segments must be above 1 with {key}.memory_scope=shared, got 1: one "
            f"segment writes no summary; raise it or set {key}.memory_scope=problem"
        )
    if settings.max_segments == 1:
        return
    names = list(phases)
    closing = [name for name in names if phases[name].closed_by is not None]
    if len(closing) != 1 or closing[0] in (names[0], names[-1]):
        raise ValueError(
            f"{key}.max_segments={settings.max_segments} needs closed_by in one phase of "
            f"{of_phases}, neither the first nor the last, got it in "
            f"{', '.join(closing) or 'none'}; for example summary: {{mode: slow, "
            "opened_by: <summary>, closed_by: </summary>}"
        )
    for name in (names[0], closing[0]):
        if phases[name].opened_by is None:
            raise ValueError(
                f"{of_phases}.{name}.opened_by must name a token where {key}.max_segments is "
                "above 1: the next context is built with it"
            )


@dataclass
class Segments:
    """The segments of B trajectories, concatenated; those of one trajectory are adjacent."""

    prompts: list[list[int]]
    """[S] context of each segment: token ids."""
    out: Decoded
    """Output of each segment, S rows."""
    owners: list[int]
    """[S] number of the trajectory that each segment belongs to, 0..B-1, never falling."""
    memories: list[Memory]
    """[S] memory file after each segment."""

    def of(self, trajectory: int) -> list[int]:
        """Numbers of a trajectory's segments, in order."""
        return [i for i, owner in enumerate(self.owners) if owner == trajectory]


def decode_segments(
    model: DecodableModel,
    prompts: Tensor,
    prompt_lengths: Tensor,
    plan: PhasePlan | Sequence[PhasePlan],
    options: DecodeOptions,
    settings: SegmentSettings,
    tokenizer: Any,
    *,
    on_block: Callable[[Block], None] | None = None,
    on_segment: Callable[[int, list[int], Memory], None] | None = None,
    num_return_sequences: int = 1,
    memories: Sequence[Memory] | None = None,
    memory_file: MemoryFile | None = None,
) -> Segments:
    """Run the pass loop segment after segment until every trajectory has ended.

    Segment i of all trajectories that have one is one batch. Trajectory i continues prompt i //
    num_return_sequences. Further arguments are those of `decode`.

    Args:
        model: an `MTPMixin` model.
        prompts: [B, T] int64, padded on the right.
        prompt_lengths: [B] int64, at least 1.
        plan: with `closed_by` in one phase if `settings.max_segments` is above 1.
        options: as in `decode`; `max_new_tokens` is the limit of a segment, and `limits` those of
            first segments.
        settings: contents of the next context.
        tokenizer: reads summaries and writes the memory file as tokens; may be None if
            `settings.max_segments` is 1.
        on_block: called after each pass; `Block.rows` are numbers of trajectories.
        on_segment: called with a trajectory's number, its next context and memory.
        memories: memory in which each trajectory begins; None: empty ones, or the file's.
        memory_file: file that all trajectories share; None: each has a memory of its own.

    The record is on the device of `prompts`. Raises ValueError for plans that the model cannot
    follow.
    """
    plans = [plan] * len(prompts) if isinstance(plan, PhasePlan) else list(plan)
    copies, device = num_return_sequences, prompts.device
    total = len(prompts) * copies
    if memories is None:
        memories = [Memory() if memory_file is None else memory_file.read()] * total
    if len(memories) != total:
        raise ValueError(
            f"memories must be one for each of the {total} trajectories, got {len(memories)}"
        )
    rows = [row[:n] for row, n in zip(prompts.tolist(), prompt_lengths.tolist(), strict=True)]
    trajectories = [
        Trajectory(rows[i // copies], plans[i // copies], settings, tokenizer, memory, memory_file)
        for i, memory in enumerate(memories)
    ]
    if any(memory.entries for memory in memories):
        prompts, prompt_lengths = (
            x.to(device) for x in pad([t.context for t in trajectories], options.pad_id)
        )
        plans, copies = [t.plan for t in trajectories], 1
    running = list(range(len(trajectories)))
    parts: list[Decoded] = []
    owners: list[int] = []
    for number in range(settings.max_segments):
        if number + 1 == settings.max_segments:
            plans = [plan.as_last_segment() for plan in plans]
        out = decode(
            model,
            prompts,
            prompt_lengths,
            plans,
            replace(
                options,
                seeds=segment_seeds(options.seeds, running, number),
                limits=options.limits if number == 0 else None,
            ),
            on_block=None if on_block is None else _renumbered(on_block, running),
            num_return_sequences=copies,
        )
        parts.append(out)
        owners += running
        for row, i in enumerate(running):
            trajectories[i].add(out.completion(row), bool(out.closed[row]))
        running = [running[row] for row in out.closed.nonzero()[:, 0].tolist()]
        if not running:
            idle_segments(model, options, settings.max_segments - number - 1)
            break
        if options.any_continues is not None:
            options.any_continues(True)
        if on_segment is not None:
            for i in running:
                on_segment(i, trajectories[i].context, trajectories[i].memory)
        copies, plans = 1, [trajectories[i].plan for i in running]
        contexts = [trajectories[i].context for i in running]
        prompts, prompt_lengths = (x.to(device) for x in pad(contexts, options.pad_id))
    order = sorted(range(len(owners)), key=owners.__getitem__)
    return Segments(
        [context for t in trajectories for context in t.contexts],
        Decoded.join(parts, options.pad_id).select(order),
        [owners[i] for i in order],
        [memory for t in trajectories for memory in t.memories],
    )


def idle_segments(model: DecodableModel, options: DecodeOptions, number: int) -> None:
    """Stay in step with processes that decode up to `number` more segments."""
    for _ in range(number):
        if options.any_continues is None or not options.any_continues(False):
            break
        idle(model, options)


def segment_seeds(seeds: Tensor | None, running: list[int], number: int) -> Tensor | None:
    """Seeds of the segments with this number, of the running trajectories."""
    if seeds is None:
        return None
    chosen = seeds[torch.tensor(running, device=seeds.device)]
    return chosen if number == 0 else mix(chosen, number, SEGMENT)


class Trajectory:
    """State of one trajectory between its segments."""

    def __init__(
        self,
        prompt: list[int],
        plan: PhasePlan,
        settings: SegmentSettings,
        tokenizer: Any,
        memory: Memory,
        memory_file: MemoryFile | None = None,
    ):
        """memory: that in which it begins. memory_file: file that its summaries edit, or None."""
        self.prompt, self.plan, self.settings, self.tokenizer = prompt, plan, settings, tokenizer
        self.memory_file, self.memory = memory_file, memory
        limit = settings.memory_tokens
        if memory.entries and (length := self.measure(memory.text)) > limit:
            where = "memories" if memory_file is None else f"memory_file {memory_file.path}"
            raise ValueError(
                f"{where} must hold at most memory_tokens={limit} tokens, got {length}; shorten it"
            )
        self.recent: list[int] = []
        self.context = prompt if not self.memory.entries else self._context()
        """Token ids that the next segment continues."""
        self.contexts: list[list[int]] = []
        self.memories: list[Memory] = []

    def add(self, written: list[int], closed: bool) -> None:
        """Add the tokens of a segment. A closed one edits the memory and makes the next context."""
        self.contexts.append(self.context)
        if closed:
            thought, summary = split_summary(written, self.plan)
            limit = self.settings.memory_tokens
            text = self.tokenizer.decode(summary)
            if self.memory_file is None:
                self.memory = self.memory.edited(text, limit, self.measure)
            else:
                self.memory = self.memory_file.edit(self.memory, text, limit, self.measure)
            self.recent += [t for t in thought if t not in self.plan.marks]
            self.recent = self.recent[max(0, len(self.recent) - self.settings.recent_tokens) :]
            self.context = self._context()
        self.memories.append(self.memory)

    def _context(self) -> list[int]:
        """The prompt, the memory and the recent tokens."""
        opener, closer = summary_marks(self.plan)
        kept = [opener, *self.plain_ids(self.memory.text), closer]
        think = self.plan.opened_by[0]
        assert think is not None
        return [*self.prompt, *kept, think, *self.recent]

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text that a model wrote, without delimiters that are spelt out in it."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [token for token in ids if token not in self.plan.marks]

    def measure(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.plain_ids(text))


def summary_marks(plan: PhasePlan) -> tuple[int, int]:
    """Ids of the tokens that open and close the phase that closes a segment."""
    opener, closer = next(
        (opener, closer)
        for opener, closer in zip(plan.opened_by, plan.closed_by, strict=True)
        if closer is not None
    )
    assert opener is not None
    return opener, closer


def split_summary(written: list[int], plan: PhasePlan) -> tuple[list[int], list[int]]:
    """Ids of a closed segment -> those before its summary's delimiter, and those of the summary.

    A segment that began in its summary has no ids before it.
    """
    opener, _ = summary_marks(plan)
    last = max((i for i, token in enumerate(written) if token == opener), default=-1)
    return written[: max(0, last)], written[last + 1 : -1]


def _renumbered(on_block: Callable[[Block], None], running: list[int]) -> Callable[[Block], None]:
    """`on_block` called with numbers of trajectories instead of rows of a segment's batch."""

    def call(block: Block) -> None:
        on_block(replace(block, rows=torch.tensor(running, device=block.rows.device)[block.rows]))

    return call
