"""Phases of an output, their modes, and where a block is cut.

Ships with checkpoints: imports torch only. Shapes: B rows, T time, K head slots.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

MODES = ("fast", "slow", "verified")
DELIMITERS = ("opened_by", "closed_by")
"""Fields of a `Phase` that name a delimiter token."""


@dataclass(kw_only=True)
class Phase:
    """A part of the output with its own mode."""

    mode: str = "slow"
    """Mode of the phase. `fast`: keep all slots of a pass. `slow`: keep slot 0 only. `verified`:
    the head's tokens are proposals, and the next pass keeps the longest prefix that main
    accepts."""
    opened_by: str | None = None
    """Delimiter, one token, that ends the previous phase and begins this one."""
    min_probability: float = field(default=0.0, metadata={"at_least": 0, "at_most": 1})
    """Threshold on the probability of the likeliest token: a block ends before the first head slot
    below it."""
    max_tokens: int | None = field(default=None, metadata={"at_least": 1})
    """Maximum number of tokens in the phase. It is then closed by force: its own `closed_by`, else
    the delimiter of the next phase, is appended in place of a sampled token."""
    closed_by: str | None = None
    """Token that ends this phase and with it the segment, as `</summary>` does: the next segment
    has its own context (`segments.py`)."""


@dataclass
class PhasePlan:
    """Phases as the pass loop needs them: token ids and numbers of kept slots.

    Example, K = 5: `PhasePlan(keep=[6, 1], opened_by=[7, 8], eos_ids=[2])` begins fast, becomes
    fast at token 7, slow at token 8 and ends at token 2. The last delimiter of a prompt determines
    the phase that the output begins in; without any it is the first phase.
    """

    keep: list[int]
    """Slots kept of a pass, by phase: 1 (slow) to K + 1 (fast); in a verified phase, slots
    proposed."""
    opened_by: list[int | None]
    """Token id that begins the phase, by phase."""
    eos_ids: list[int] = field(default_factory=list)
    verified: list[bool] = field(default_factory=list)
    """True for phases where the head's tokens are proposals; if empty: False for all."""
    min_probability: list[float] = field(default_factory=list)
    """Threshold of each phase, see `Phase`; if empty: 0 for all."""
    max_tokens: list[int | None] = field(default_factory=list)
    """Maximum number of tokens of each phase, see `Phase`; if empty: no limit."""
    closed_by: list[int | None] = field(default_factory=list)
    """Token id that ends each phase and the segment; if empty: none for any."""
    forced: list[int | None] = field(default_factory=list)
    """Token id that closes each phase when its `max_tokens` are used up; if empty: the phase's
    `closed_by`, else the next phase's `opened_by`."""

    def __post_init__(self) -> None:
        number = len(self.keep)
        self.verified = self.verified or [False] * number
        self.min_probability = self.min_probability or [0.0] * number
        self.max_tokens = self.max_tokens or [None] * number
        self.closed_by = self.closed_by or [None] * number
        following = [*self.opened_by[1:], None]
        own = [f if c is None else c for c, f in zip(self.closed_by, following, strict=True)]
        self.forced = self.forced or own
        self.delimiters = [i for i in self.opened_by if i is not None]
        self.begun = [p for p, i in enumerate(self.opened_by) if i is not None]

    @property
    def closers(self) -> list[int]:
        """Ids of the tokens that close a segment."""
        return [token for token in self.closed_by if token is not None]

    @property
    def marks(self) -> set[int]:
        """Ids of all delimiters and end tokens."""
        return {*self.delimiters, *self.closers, *self.eos_ids}

    def as_slow(self) -> "PhasePlan":
        """The same phases, every one in slow mode."""
        return replace(self, keep=[1] * len(self.keep), verified=[False] * len(self.keep))

    def as_verified(self, block_size: int) -> "PhasePlan":
        """The same phases, every one in verified mode with proposals of `block_size` - 1 tokens."""
        number = len(self.keep)
        return replace(self, keep=[block_size] * number, verified=[True] * number)

    def as_last_segment(self) -> "PhasePlan":
        """The same phases for the last segment: no token closes it, and budgets lead to the last
        phase, the answer.
        """
        if not self.closers:
            return self
        number, answer = len(self.keep), self.opened_by[-1]
        return replace(self, closed_by=[None] * number, forced=[answer] * (number - 1) + [None])

    def opened(self, tokens: Tensor) -> Tensor:
        """[...] token ids -> [...] index of the phase that each begins, or -1."""
        phase = torch.full_like(tokens, -1)
        for token, begun in zip(self.delimiters, self.begun, strict=True):
            phase = torch.where(tokens == token, begun, phase)
        return phase

    def is_end(self, tokens: Tensor) -> Tensor:
        """[...] token ids -> [...] bool, True where the token ends the sequence."""
        end = torch.zeros_like(tokens, dtype=torch.bool)
        for token in self.eos_ids:
            end |= tokens == token
        return end

    def closes(self, tokens: Tensor, phase: Tensor) -> Tensor:
        """[...] token ids and phases -> [...] bool, True where the token closes the segment."""
        closes = torch.zeros_like(tokens, dtype=torch.bool)
        for number, token in enumerate(self.closed_by):
            if token is not None:
                closes |= (phase == number) & (tokens == token)
        return closes

    def stops(self, tokens: Tensor) -> Tensor:
        """[...] token ids -> [...] bool, True for delimiters and end tokens, which cut a block.

        A token that closes a segment is a delimiter in every phase.
        """
        stops = (self.opened(tokens) >= 0) | self.is_end(tokens)
        for token in self.closers:
            stops |= tokens == token
        return stops

    def phase_after(self, tokens: Tensor, phase: Tensor | None = None) -> Tensor:
        """Phase after each token: [B, T] -> [B, T], given the phase before them ([B], or 0)."""
        opened = self.opened(tokens)
        where = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        last = torch.where(opened >= 0, where, -1).cummax(1).values
        before = torch.zeros_like(tokens[:, 0]) if phase is None else phase
        return torch.where(last >= 0, opened.gather(1, last.clamp(min=0)), before[:, None])

    def cut(self, block: Tensor) -> Tensor:
        """[B, J] tokens -> [B] number of tokens up to the first delimiter or end token."""
        stops = self.stops(block)
        width = block.shape[1]
        first = torch.where(stops, torch.arange(width, device=block.device), width).min(1).values
        return (first + 1).clamp(max=width)

    def kept(self, block: Tensor, phase: Tensor) -> Tensor:
        """Number of tokens kept of each block: [B, K + 1] tokens and [B] phases -> [B].

        The phase's own number, cut after the first delimiter or end token.
        """
        return torch.minimum(torch.tensor(self.keep, device=block.device)[phase], self.cut(block))


def make_plan(
    phases: list[Phase],
    opened_by: list[int | None],
    *,
    block_size: int,
    eos_ids: list[int],
    mode: str = "fast",
    closed_by: list[int | None] | None = None,
) -> PhasePlan:
    """The plan of a request.

    Args:
        phases: in order.
        opened_by: token id of each phase's delimiter.
        block_size: K + 1, the slots of a pass that fast and verified phases use.
        eos_ids: tokens that end a sequence.
        mode: `fast` runs each phase in its own mode, `slow` and `verified` run all in that mode.
        closed_by: id of the token that closes the segment, by phase; None: in no phase.

    Raises ValueError for another mode.
    """
    plan = PhasePlan(
        keep=[1 if phase.mode == "slow" else block_size for phase in phases],
        opened_by=opened_by,
        eos_ids=eos_ids,
        verified=[phase.mode == "verified" for phase in phases],
        min_probability=[phase.min_probability for phase in phases],
        max_tokens=[phase.max_tokens for phase in phases],
        closed_by=closed_by or [],
    )
    if mode == "slow":
        return plan.as_slow()
    if mode == "verified":
        return plan.as_verified(block_size)
    if mode != "fast":
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
    return plan


def check_plans(plans: list[PhasePlan], num_rows: int, block_size: int, vocab_size: int) -> None:
    """Raises ValueError for plans that no batch of this model can follow."""
    if len(plans) != num_rows:
        raise ValueError(f"plan must be one for all or one per row ({num_rows}), got {len(plans)}")
    first = plans[0]
    for plan in {id(p): p for p in plans}.values():
        named = plan.opened_by, plan.eos_ids, plan.closed_by
        if named != (first.opened_by, first.eos_ids, first.closed_by):
            raise ValueError(
                "plans of one batch must have the same delimiters and end tokens, got opened_by "
                f"{first.opened_by} and {plan.opened_by}; decode such requests apart"
            )
        bad = [keep for keep in plan.keep if not 1 <= keep <= block_size]
        if bad:
            raise ValueError(
                f"plan.keep must be between 1 and {block_size} (the head writes k = "
                f"{block_size - 1} tokens a pass), got {bad[0]}; ask for a smaller k or train a "
                "head with more slots"
            )
        unknown = [t for t in sorted(plan.marks) if not 0 <= t < vocab_size]
        if unknown:
            raise ValueError(
                f"phase token {unknown[0]} is not in the model's vocabulary of {vocab_size}; give "
                "the id of a token that the tokenizer has"
            )
        both = set(plan.closers) & {*plan.delimiters, *plan.eos_ids}
        if both:
            raise ValueError(
                f"token {min(both)} closes a segment (closed_by) and opens a phase or ends the "
                "sequence; give closed_by a token of its own"
            )
        for phase, limit in enumerate(plan.max_tokens):
            if limit is None:
                continue
            if limit < 1:
                raise ValueError(f"max_tokens of phase {phase} must be at least 1, got {limit}")
            if plan.forced[phase] is None:
                raise ValueError(
                    f"max_tokens of phase {phase} needs a phase after it, whose delimiter closes "
                    "it; limit the last phase by max_new_tokens"
                )


class PlanTables:
    """Settings by row and phase, [R, P] each, of requests that may differ in their plans."""

    def __init__(self, plans: list[PhasePlan], limit: int, device: torch.device):
        def table(values: list[Any]) -> Tensor:
            return torch.tensor(values, device=device)

        self.keep = table([p.keep for p in plans])
        self.verified = table([p.verified for p in plans])
        self.min_logprob = table([p.min_probability for p in plans]).log()
        self.budget = table([[limit if m is None else m for m in p.max_tokens] for p in plans])
        self.has_verified = any(any(p.verified) for p in plans)
        self.has_thresholds = any(any(p.min_probability) for p in plans)
        self.has_budgets = any(m is not None for p in plans for m in p.max_tokens)
        self.num_head_slots = max(max(p.keep) for p in plans) - 1
        self.forced = table([[0 if f is None else f for f in p.forced] for p in plans])

    def select(self, rows: Tensor) -> None:
        """Keep the given rows only."""
        for name in ("keep", "verified", "min_logprob", "budget", "forced"):
            setattr(self, name, getattr(self, name)[rows])


def check_phases(phases: dict[str, Phase], where: str) -> None:
    """Raises ValueError for an impossible setting; `where` is the beginning of its key."""
    names = list(phases)
    for name, phase in phases.items():
        key = f"{where}.{name}"
        if phase.mode not in MODES:
            raise ValueError(f"{key}.mode must be one of {list(MODES)}, got {phase.mode!r}")
        if not 0 <= phase.min_probability <= 1:
            raise ValueError(
                f"{key}.min_probability must be between 0 and 1, got {phase.min_probability}"
            )
        openers = [p.opened_by for p in phases.values()]
        if phase.opened_by is not None and openers.count(phase.opened_by) > 1:
            raise ValueError(
                f"{key}.opened_by must be a token of its own, got {phase.opened_by!r}, which opens "
                "another phase too"
            )
        if phase.closed_by is not None and phase.closed_by in openers:
            raise ValueError(
                f"{key}.closed_by must be a token of its own, got {phase.closed_by!r}, which opens "
                "a phase"
            )
        if phase.max_tokens is None:
            continue
        if phase.max_tokens < 1:
            raise ValueError(f"{key}.max_tokens must be at least 1, got {phase.max_tokens}")
        if name == names[-1] and phase.closed_by is None:
            raise ValueError(
                f"{key}.max_tokens needs a phase after it, whose delimiter closes this one; limit "
                "the last phase by max_new_tokens"
            )


def phases_to_json(
    phases: dict[str, Phase], token_id: Callable[[str], int]
) -> list[dict[str, Any]]:
    """Content of `generation_config.mtp_phases`; `token_id` maps a delimiter to its id."""
    out = []
    for name, phase in phases.items():
        entry = {"name": name, **asdict(phase)}
        for key in DELIMITERS:
            entry[key] = None if entry[key] is None else token_id(entry[key])
        out.append(entry)
    return out


def phases_from_json(
    saved: list[dict[str, Any]], token_text: Callable[[int], str]
) -> dict[str, Phase]:
    """The phases by name; `token_text` maps a token id to its delimiter."""
    phases = {}
    for entry in saved:
        fields = {key: value for key, value in entry.items() if key != "name"}
        for key in DELIMITERS:
            if fields.get(key) is not None:
                fields[key] = token_text(fields[key])
        phases[entry["name"]] = Phase(**fields)
    return phases
