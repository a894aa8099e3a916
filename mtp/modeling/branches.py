"""Branches of a text at pass boundaries, and the pass loop that grows them.

What every search has in common: a `Branch` is a text that has been written up to a pass boundary;
`BranchLoop` runs one pass of many branches at a time, samples several blocks from one read of each,
and goes on with those that the search chooses. A boundary is a place to branch because all that the
next pass knows of the last is a few discrete tokens: a copy of the key-value cache and those tokens
are the whole state, and nothing that was sampled has to be averaged or rounded.

Drafts of a verified phase that nobody has verified yet stay with a branch while its loop runs. A
branch that a new loop goes on with has none: main's text follows the same distribution without.

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
    """A text at a pass boundary: its parent's and one block more. A prompt's first has no block."""

    prompt: int
    """Row of the batch of prompts that it continues."""
    parent: "Branch | None" = None
    tokens: list[int] = field(default_factory=list)
    """Of the block."""
    slots: list[int] = field(default_factory=list)
    """Of the block's tokens, see `Decoded`."""
    accepted: list[int] = field(default_factory=list)
    """Of the block's tokens, see `Decoded`."""
    logprobs: list[float] = field(default_factory=list)
    """Of the block's tokens, see `Decoded`."""
    is_open: bool = True
    """False where the text has ended, or has as many tokens as it may."""
    finished: bool = False
    """The text ended by an end token or a stopping criterion, not by the limit."""
    score: float = math.nan
    """By which searches rank: the judge's, or made of log-probabilities."""
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
        """Passes of main that the whole text took."""
        self.num_tokens: int = len(self.tokens) + (0 if before is None else before.num_tokens)
        """Of the whole text."""
        self.num_drawn: int = 0 if before is None else before.num_drawn
        """Tokens of the whole text that were drawn, not forced."""
        self.num_drawn += sum(slot != FORCED for slot in self.slots)
        self.logprob: float = sum(self.logprobs) + (0.0 if before is None else before.logprob)
        """Of the whole text, in nats."""

    def path(self) -> list["Branch"]:
        """The branches that lead here, the prompt's first and this one included."""
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


Judge = Callable[[list[Branch]], Sequence[float]]
"""Scores of branches, the higher the better: a reward of ended ones, a value of open ones."""
AnswerOf = Callable[[list[int]], Hashable | None]
"""Token ids of an output -> its final answer, None if it has none."""


@dataclass(kw_only=True)
class SearchConfig:
    """How to search."""

    method: str = "best_of_n"
    """`best_of_n`: sample n texts. `beam`: keep n branches at every pass boundary. `mcts`: a tree
    of n simulations whose edges are passes."""
    n: int = 8
    """Texts, branches or simulations of each prompt."""
    expand: int = 4
    """Blocks drawn from every pass, of `beam` and `mcts`. Those that say the same count once."""
    choose: str = "score"
    """Among the texts that were found: `score` takes the best, `majority` the best of those whose
    final answer is the most frequent."""
    length_penalty: float = 1.0
    """Without a judge, a score is the sum of the log-probabilities over the number of tokens to
    this power: 1 is their mean, 0 their sum."""
    exploration: float = 1.25
    """Weight of PUCT's bonus for what was visited little, of `mcts`; scores are brought to 0-1."""
    rollouts: bool = True
    """`mcts` scores the text that a simulation comes to at its end. False: what it has after one
    new pass, so the judge must be able to judge open branches."""

    def check(self, sampler: Sampler, judge: Judge | None, answer_of: AnswerOf | None) -> None:
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
            raise ValueError(f"search.rollouts=False is of method mcts, got {self.method}")
        if not self.rollouts and judge is None:
            raise ValueError(
                "search.rollouts=False needs a judge of open branches; give one, or keep rollouts"
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
    """What a search has cost, by prompt; work that branches share counts once."""

    def __init__(self, num_prompts: int):
        self.passes = [0] * num_prompts
        """Rows of main's forward passes."""
        self.tokens = [0] * num_prompts
        """Tokens that main has read."""


@dataclass(kw_only=True)
class SearchRequest:
    """Prompts to search for, how to decode them, and what has been spent."""

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
    """What was made of each branch's block when main read it."""

    by_branch: dict[Branch, Tensor] = field(default_factory=dict)
    """[W, numbers] keys and values of the positions from the branch's `start` on, all layers'."""
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
        """Begin at open branches, of which the next pass draws `num_copies` blocks each.

        The branches are all without a block, or `parts` holds those of all branches that they come
        from. The loop adds the parts of what it reads.
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
        """Put the loop's rows where the branches are."""
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
        """As in the pass loop; notes its cost and, where they are kept, the branches' parts."""
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
        """One pass: what each open branch grew into, in order, as often as blocks were drawn."""
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
        """Go on with open branches of this loop only, of which the next pass draws `num_copies`
        blocks each.

        Their key-value cache is copied once, whatever `num_copies` is. The first of a branch's
        blocks begins with what main accepts of its drafts. The others are sampled as if there were
        none: copies that all verify the same drafts would be identical.
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
    """The rows, each filled up on the right to the longest."""
    longest = max(map(len, rows))
    return [row + [fill] * (longest - len(row)) for row in rows]


def give_scores(config: SearchConfig, judge: Judge | None, branches: list[Branch]) -> None:
    """Write each branch's `score`.

    Raises ValueError if the judge does not give a finite number for every branch.
    """
    if judge is None:
        for branch in branches:
            branch.score = branch.logprob / max(1, branch.num_drawn) ** config.length_penalty
        return
    scores = [float(score) for score in judge(branches)]
    if len(scores) != len(branches):
        raise ValueError(
            f"the judge must give a score for each of {len(branches)} branches, got {len(scores)}"
        )
    for branch, score in zip(branches, scores, strict=True):
        if not math.isfinite(score):
            raise ValueError(f"the judge must give finite scores, got {score} for {branch.text()}")
        branch.score = score
