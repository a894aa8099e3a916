"""Branches of a text at pass boundaries, and the pass loop that grows them.

All searches share this: a `Branch` is a text that has been written up to a pass boundary.
`BranchLoop` runs one pass of many branches at a time, samples several blocks from one read of each,
and continues the branches that the search chooses. A text can branch at a boundary because the next
pass depends on the last one only through a few discrete tokens. A copy of the key-value cache and
these tokens are the whole state, and no sampled quantity has to be averaged or rounded.

In a verified phase, a branch keeps its unverified drafts while its loop runs. Drafts are dropped
when a new loop takes over a branch; the distribution of main's text does not change.

Ships with checkpoints: imports torch and siblings only.

Shapes: B prompts, R running rows, W positions that a pass reads.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .decode import PassLoop
from .decode_options import DecodableModel, DecodeOptions
from .phases import PhasePlan, check_plans
from .records import FORCED, Decoded
from .sampler import Sampler

METHODS = ("best_of_n", "beam", "mcts")
CHOICES = ("score", "majority")


@dataclass(eq=False, kw_only=True)
class Branch:
    """A text at a pass boundary: its parent's text and one more block. A prompt's first branch has
    no block.
    """

    prompt: int
    """Row of the batch of prompts that it continues."""
    parent: "Branch | None" = None
    tokens: list[int] = field(default_factory=list)
    """Token ids of the block."""
    slots: list[int] = field(default_factory=list)
    """Slot of each token of the block, see `Decoded`."""
    accepted: list[int] = field(default_factory=list)
    """Slot that proposed each accepted token of the block, see `Decoded`."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token of the block, see `Decoded`."""
    is_open: bool = True
    """False if the text has ended or has reached its maximum number of tokens."""
    finished: bool = False
    """True if the text ended by an end token or a stopping criterion, not by the limit."""
    score: float = math.nan
    """Number that searches rank by: the scoring function's, or computed from log-probabilities."""
    row: int = -1
    """Running row of the loop that holds it."""
    phase: int = 0
    """Index of the phase that the next pass begins in."""
    in_phase: int = 0
    """Output tokens of that phase so far."""
    start: int = 0
    """Position of the first token that main has not read."""

    def __post_init__(self) -> None:
        before = self.parent
        self.num_passes: int = 0 if before is None else before.num_passes + 1
        """Forward passes of main for the whole text."""
        self.num_tokens: int = len(self.tokens) + (0 if before is None else before.num_tokens)
        """Tokens of the whole text."""
        self.num_sampled: int = 0 if before is None else before.num_sampled
        """Sampled tokens of the whole text; forced ones are not counted."""
        self.num_sampled += sum(slot != FORCED for slot in self.slots)
        self.logprob: float = sum(self.logprobs) + (0.0 if before is None else before.logprob)
        """Log-probability of the whole text, in nats."""

    def path(self) -> list["Branch"]:
        """The branches from the prompt's first to this one, both included."""
        out, branch = [], self
        while branch.parent is not None:
            out.append(branch)
            branch = branch.parent
        return [branch, *reversed(out)]

    def text(self) -> list[int]:
        """Token ids of the whole output so far."""
        return self.whole("tokens")

    def whole(self, name: str) -> list[Any]:
        """`tokens`, `slots`, `accepted` or `logprobs` of the whole output so far."""
        return [value for branch in self.path() for value in getattr(branch, name)]


Scorer = Callable[[list[Branch]], Sequence[float]]
"""Gives each branch a score, higher is better: a reward for ended texts, a value for open ones."""
AnswerOf = Callable[[list[int]], Hashable | None]
"""Maps the token ids of an output to its final answer, None if it has none."""


@dataclass(kw_only=True)
class SearchConfig:
    """Settings of a search."""

    method: str = "best_of_n"
    """Search algorithm. `best_of_n`: sample n texts. `beam`: keep n branches at every pass
    boundary. `mcts`: a tree of n simulations whose edges are passes."""
    n: int = 8
    """Number of texts, branches or simulations per prompt."""
    expand: int = 4
    """Number of blocks that `beam` and `mcts` sample from every pass. Identical blocks count
    once."""
    choose: str = "score"
    """Choice among the texts that were found: `score` takes the best, `majority` the best one with
    the most frequent final answer."""
    length_penalty: float = 1.0
    """Exponent of the number of tokens in the score without a scoring function, which is the sum of
    the log-probabilities divided by this power: 1 is their mean, 0 their sum."""
    exploration: float = 1.25
    """Weight of PUCT's bonus for rarely visited branches (`mcts`); scores are scaled to 0-1."""
    rollouts: bool = True
    """Score the text at the end of each simulation (`mcts`). False: score it after one new pass, so
    the scoring function must accept open branches."""

    def check(self, sampler: Sampler, scorer: Scorer | None, answer_of: AnswerOf | None) -> None:
        """Raises ValueError naming the key of a setting that no search can follow."""
        if self.method not in METHODS:
            raise ValueError(f"search.method must be one of {list(METHODS)}, got {self.method!r}")
        if self.choose not in CHOICES:
            raise ValueError(f"search.choose must be one of {list(CHOICES)}, got {self.choose!r}")
        if self.n < 1:
            raise ValueError(f"search.n must be at least 1, got {self.n}")
        if self.method != "best_of_n" and self.expand < 2:
            raise ValueError(
                f"search.expand must be at least 2, got {self.expand}: a single block of a pass "
                "leaves nothing to choose from"
            )
        if self.exploration < 0:
            raise ValueError(f"search.exploration must be 0 or above, got {self.exploration}")
        if not self.rollouts and self.method != "mcts":
            raise ValueError(
                f"search.rollouts=False requires search.method=mcts, got {self.method}"
            )
        if not self.rollouts and scorer is None:
            raise ValueError(
                "search.rollouts=False needs a scorer of open branches; give one, or set "
                "search.rollouts=True"
            )
        if self.choose == "majority" and answer_of is None:
            raise ValueError(
                "search.choose=majority needs answer_of, which takes an output's token ids to its "
                "final answer"
            )
        if sampler.temperature == 0 or sampler.top_k == 1:
            raise ValueError(
                "a search needs different blocks of the same pass, so sampling must be on; got "
                f"temperature={sampler.temperature:g}, top_k={sampler.top_k} (set do_sample=True "
                "and a temperature above 0)"
            )


class Spent:
    """Cost of a search, by prompt; work that branches share counts once."""

    def __init__(self, num_prompts: int):
        self.passes = [0] * num_prompts
        """Rows of main's forward passes."""
        self.tokens = [0] * num_prompts
        """Tokens that main reads."""


@dataclass(kw_only=True)
class SearchRequest:
    """Prompts to search for, how to decode them, and the cost so far."""

    model: DecodableModel
    prompts: Tensor
    prompt_lengths: Tensor
    plans: list[PhasePlan]
    options: DecodeOptions

    def __post_init__(self) -> None:
        self.spent = Spent(len(self.prompts))

    def check(self) -> None:
        """Raises ValueError for what no pass loop can follow."""
        model = self.model
        check_plans(self.plans, len(self.prompts), model.block_size, model.config.vocab_size)
        self.options.check()

    def roots(self) -> list[Branch]:
        """A branch of each prompt, with nothing written yet."""
        return [Branch(prompt=row) for row in range(len(self.prompts))]


@dataclass
class Parts:
    """Keys and values of each branch's block, kept from the pass in which main read it."""

    by_branch: dict[Branch, Tensor] = field(default_factory=dict)
    """[W, numbers] keys and values of each branch's positions from its `start` on, all layers
    concatenated."""
    shapes: list[tuple[int, int]] = field(default_factory=list)
    """(heads, width) of each layer's keys and values."""

    def before(self, branch: Branch) -> Tensor:
        """[start, numbers] keys and values of all positions before its first unread one."""
        path = branch.path()
        pairs = zip(path, path[1:], strict=False)
        return torch.cat([self.by_branch[a][: b.start - a.start] for a, b in pairs])


class BranchLoop(PassLoop):
    """A pass loop whose rows are branches."""

    def __init__(
        self,
        request: SearchRequest,
        branches: list[Branch],
        num_copies: int,
        parts: Parts | None = None,
    ):
        """Begin at open branches; the next pass samples `num_copies` blocks of each.

        Either no branch has a block, or `parts` holds the blocks of all their ancestors. The loop
        adds the parts of the blocks that it reads.
        """
        of = [branch.prompt for branch in branches for _ in range(num_copies)]
        super().__init__(
            request.model,
            request.prompts[of],
            request.prompt_lengths[of],
            [request.plans[prompt] for prompt in of],
            request.options,
            num_copies,
        )
        self.spent, self.parts = request.spent, parts
        self.branches = {row: branches[row // num_copies] for row in range(len(of))}
        if branches[0].parent is not None:
            self.resume(branches, num_copies)

    def resume(self, branches: list[Branch], num_copies: int) -> None:
        """Set the loop's rows to the states of the branches."""
        device = self.running.rows.device

        def rows_of(values: list[Any]) -> Tensor:
            return torch.tensor(values, device=device).repeat_interleave(num_copies, 0)

        def whole(name: str, fill: int | float) -> Tensor:
            return rows_of(padded([branch.whole(name) for branch in branches], fill))

        written = Decoded(
            tokens=whole("tokens", self.running.pad_id),
            slots=whole("slots", -1),
            logprobs=whole("logprobs", 0.0),
            lengths=rows_of([branch.num_tokens for branch in branches]),
            passes=rows_of([branch.num_passes for branch in branches]),
            finished=rows_of([branch.finished for branch in branches]),
            accepted=whole("accepted", 0),
        )
        of_phase = ("phase", "in_phase", "start")
        phase, in_phase, start = (rows_of([getattr(b, n) for b in branches]) for n in of_phase)
        if self.model.reads_whole_text:
            self.running.resume(written, phase, in_phase, torch.zeros_like(start))
            return
        self.running.resume(written, phase, in_phase, start)
        assert self.parts is not None
        read = [self.parts.before(branch) for branch in branches]
        parts = torch.nn.utils.rnn.pad_sequence(read, batch_first=True)
        self.cache.load(parts, self.parts.shapes)

    def read(self) -> Tensor:
        """Read as the pass loop does; record the cost and, if kept, the branches' parts."""
        num_copies, running = self.num_copies, self.running
        read = running.num_fresh + running.num_drafts
        first = [x[::num_copies] for x in (running.rows, running.active, running.start, read)]
        hidden = super().read()
        reading = torch.stack(first, 1).tolist()
        for row, active, _, number in reading:
            if active:
                self.spent.passes[self.branches[row].prompt] += 1
                self.spent.tokens[self.branches[row].prompt] += number
        if self.parts is not None and not self.model.reads_whole_text:
            rows = torch.arange(len(reading), device=running.rows.device) * num_copies
            made = self.cache.part(rows, first[2], running.fed.shape[1])
            self.parts.shapes = self.cache.shapes
            for i, (row, *_) in enumerate(reading):
                self.parts.by_branch[self.branches[row]] = made[i]
        return hidden

    def step(self) -> list[Branch]:
        """Run one pass. Returns the children of the open branches, one per sampled block."""
        running = self.running
        added, _ = self.run_pass()
        columns = (added.tokens, added.slots, added.accepted, added.logprobs)
        tokens, slots, accepted, logprobs = (column.tolist() for column in columns)
        state = torch.stack(
            [running.rows, running.active, running.phase, running.in_phase, running.start], 1
        )
        finished, grown = running.out.finished.tolist(), []
        running_at = {row: (i, *s) for i, (row, active, *s) in enumerate(state.tolist()) if active}
        pairs = zip(added.rows.tolist(), added.lengths.tolist(), strict=True)
        for at, (row, length) in enumerate(pairs):
            if not length:
                continue
            parent = self.branches[row]
            child = Branch(
                prompt=parent.prompt,
                parent=parent,
                tokens=tokens[at][:length],
                slots=slots[at][:length],
                accepted=accepted[at][:length],
                logprobs=logprobs[at][:length],
                is_open=row in running_at,
                finished=finished[row],
            )
            if child.is_open:
                child.row, child.phase, child.in_phase, child.start = running_at[row]
            self.branches[row] = child
            grown.append(child)
        return grown

    def fork(self, branches: list[Branch], num_copies: int) -> None:
        """Continue with open branches of this loop only; the next pass samples `num_copies` blocks
        of each.

        Their key-value cache is copied once, whatever `num_copies` is. The first block of a branch
        begins with the drafts that main accepts. The others are sampled without drafts: copies that
        all verify the same drafts would be identical.
        """
        running = self.running
        chosen = torch.tensor([branch.row for branch in branches], device=running.rows.device)
        copies = chosen.repeat_interleave(num_copies)
        running.select(copies)
        running.renumber()
        running.drop_drafts(running.rows % num_copies > 0)
        self.cache.select(chosen)
        self.samples.renew(len(copies))
        self.num_copies = num_copies
        self.branches = {row: branches[row // num_copies] for row in range(len(copies))}


def padded(rows: list[list[Any]], fill: Any) -> list[list[Any]]:
    """The rows, each padded on the right to the longest."""
    longest = max(map(len, rows))
    return [row + [fill] * (longest - len(row)) for row in rows]


def give_scores(config: SearchConfig, scorer: Scorer | None, branches: list[Branch]) -> None:
    """Write each branch's `score`. A scorer is not called without branches.

    Raises ValueError if the scorer does not give a finite number for every branch.
    """
    if scorer is None:
        for branch in branches:
            branch.score = branch.logprob / max(1, branch.num_sampled) ** config.length_penalty
        return
    if not branches:
        return
    scores = [float(score) for score in scorer(branches)]
    if len(scores) != len(branches):
        raise ValueError(
            f"the scorer must give a score for each of {len(branches)} branches, got {len(scores)}"
        )
    for branch, score in zip(branches, scores, strict=True):
        if not math.isfinite(score):
            raise ValueError(f"the scorer must give finite scores, got {score} for {branch.text()}")
        branch.score = score
