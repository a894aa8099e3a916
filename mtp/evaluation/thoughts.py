"""Records of rollouts for the report: who wrote each token, in which pass, and where it is wrong.

An evaluation that ends a stage keeps rollouts up to a limit of tokens: the first problems, which
are the same at every evaluation, then those with a wrong answer, then the others. An evaluation
within a stage keeps some of the first problems. `docs/reports.md` describes the fields.

All values follow from the weights and the problems, so a resumed run writes the same records.
"""

import hashlib
import math
from typing import Any

from ..modeling.phases import PhasePlan
from ..modeling.records import FORCED
from ..reports.tables import is_right
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import Rollouts
from ..rollouts.tokenization import text_pieces
from ..tasks.base import Example, Step, Task, fingerprint
from .token_scores import Alternatives, TokenScores, token_scores

DIGITS = 4
"""Decimals of log-probabilities and entropies."""
WITHIN_STAGE = 8
"""An evaluation within a stage keeps this fraction of the tokens: 1 / 8."""

Decoded = dict[str, list[Rollouts]]
"""Batches of rollouts of the same problems, in order, by mode."""


def shown_mode(decoded: Decoded) -> str:
    """The mode whose rollouts are shown: fast where the head is used."""
    return "fast" if "fast" in decoded else "slow"


def outcome_rows(decoded: Decoded, task: Task, fmt: PromptFormat, stage: str) -> list[dict]:
    """For each mode, which problems were answered correctly: a `1` or a `0` per problem.

    `problems` is a hash of the prompts: rows with the same hash can be compared problem by problem.
    `project_size` counts the problems of a project, which follow each other and may fail together.
    Empty for a task that does not verify answers.
    """
    if not task.has_verifier:
        return []
    rows = []
    for mode, batches in decoded.items():
        hashed = hashlib.sha256()
        right, size = "", 1
        for batch in batches:
            for row in range(len(batch)):
                size = max(size, batch.example(row).place + 1)
                hashed.update(fingerprint(batch.example(row)).encode())
                right += str(int(_right(batch, row, task, fmt) is True))
        problems = hashed.hexdigest()[:16]
        about = {"stage": stage, "mode": mode, "problems": problems, "project_size": size}
        rows.append({**about, "right": right})
    return rows


def _right(batch: Rollouts, row: int, task: Task, fmt: PromptFormat) -> bool | None:
    ids = batch.completion(row)
    return is_right(task, batch.example(row), fmt.answer_text(ids), ids)


def thought_rows(
    model: Any,
    decoded: Decoded,
    task: Task,
    fmt: PromptFormat,
    *,
    stage: str,
    max_tokens: int,
    ends_stage: bool,
    reference: Any = None,
) -> list[dict[str, Any]]:
    """Records of the rollouts that are kept.

    Args:
        model: the model that wrote them; all processes call this together.
        decoded: rollouts by mode.
        task: verifier of answers and of steps.
        fmt: tokens and phases.
        stage: name of the stage.
        max_tokens: no further rollout is kept once this many tokens are.
        ends_stage: False keeps a fraction of the first problems.
        reference: frozen model that also scores the tokens; None: none does.
    """
    mode = shown_mode(decoded)
    batches = decoded[mode]
    chosen = choose(batches, task, fmt, max_tokens, ends_stage)
    rows: dict[int, dict[str, Any]] = {}
    first = 0
    for batch in batches:
        mine = [problem for problem in chosen if first <= problem < first + len(batch)]
        segments = [s for problem in mine for s in batch.segments_of(problem - first)]
        if segments:
            found = token_scores(
                model, batch, segments, fmt, use_head=mode != "slow", reference=reference
            )
            scores = dict(zip(segments, found, strict=True))
            for problem in mine:
                about = {"stage": stage, "mode": mode, "problem": problem}
                rows[problem] = about | thought_row(batch, problem - first, scores, task, fmt, mode)
        first += len(batch)
    return [rows[problem] for problem in chosen]


def choose(
    batches: list[Rollouts], task: Task, fmt: PromptFormat, max_tokens: int, ends_stage: bool
) -> list[int]:
    """Numbers of the problems whose rollouts are kept, see the module."""
    lengths, right = [], []
    for batch in batches:
        lengths += batch.total(batch.out.lengths).long().tolist()
        right += [_right(batch, row, task, fmt) for row in range(len(batch))]
    limit = max_tokens if ends_stage else max_tokens // WITHIN_STAGE
    first = limit // 2 if ends_stage else limit
    chosen = within_limit(list(range(len(lengths))), lengths, first)
    if not ends_stage:
        return chosen
    rest = range(len(chosen), len(lengths))
    wrong = [p for p in rest if right[p] is False]
    others = [p for p in rest if right[p] is not False]
    left = limit - sum(lengths[p] for p in chosen)
    return chosen + within_limit(wrong + others, lengths, left)


def within_limit(problems: list[int], lengths: list[int], limit: int) -> list[int]:
    """The first of the problems until their tokens reach the limit."""
    total = 0
    for number, problem in enumerate(problems):
        if total >= limit:
            return problems[:number]
        total += lengths[problem]
    return problems


def thought_row(
    batch: Rollouts,
    row: int,
    scores: dict[int, TokenScores],
    task: Task,
    fmt: PromptFormat,
    mode: str,
) -> dict[str, Any]:
    """One rollout: columns with a value per token, over all its segments."""
    example, plan = batch.example(row), fmt.plan(mode)
    columns: dict[str, list[Any]] = {}
    segments: list[dict[str, Any]] = []
    phases: list[list[Any]] = []
    passes: list[int] = []
    names = [(name, "slow" if mode == "slow" else p.mode) for name, p in fmt.phases.items()]
    for segment in batch.segments_of(row):
        start, length = len(columns.get("tokens", [])), int(batch.out.lengths[segment])
        ids = batch.out.completion(segment)
        slots = batch.out.slots[segment, :length].tolist()
        accepted = batch.out.accepted[segment, :length].tolist()
        segments.append(
            {
                "start": start,
                "context": str(fmt.tokenizer.decode(batch.prompts[segment])),
                "ended_by": batch.out.ended_by(segment),
                "memory": batch.memories[segment].text,
            }
        )
        phases += [[start + at, *names[phase]] for at, phase in phase_starts(ids, plan)]
        passes += [start + at for at in batch.pass_starts(segment)]
        logprobs = batch.out.logprobs[segment, :length].tolist()
        added = {
            "tokens": text_pieces(fmt.tokenizer, ids),
            "slots": slots,
            "accepted": accepted,
            "logprob": [None if s == FORCED else v for v, s in zip(logprobs, slots, strict=True)],
            **_texts(scores[segment], ids, fmt),
        }
        for name, values in added.items():
            columns.setdefault(name, []).extend(values)
    given = fmt.answer_text(batch.completion(row))
    right = _right(batch, row, task, fmt)
    steps = steps_in_tokens(batch, row, task, fmt)
    return {
        "prompt": example.shown,
        "answer": example.answer,
        "given": given,
        "right": right,
        "passes": passes,
        "phases": phases,
        "segments": segments,
        "steps": [list(step) for step, _ in steps],
        "mistake": mistake(example, given, right, steps, columns["tokens"], phases),
        **{name: _rounded(values) for name, values in columns.items() if _says_something(values)},
    }


def _says_something(values: list[Any]) -> bool:
    """Whether a column holds anything but zeros and None; False says that two tokens differ."""
    return any(value is not None and (value is False or value != 0) for value in values)


def _rounded(values: list[Any]) -> list[Any]:
    """Floats with few decimals; None for what is not finite."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, DIGITS) if math.isfinite(value) else None
        return [short(one) for one in value] if isinstance(value, list) else value

    return short(values)


def _texts(scores: TokenScores, ids: list[int], fmt: PromptFormat) -> dict[str, list[Any]]:
    """Columns of a segment's scores, with texts in place of token ids.

    `agrees`: whether main's likeliest token is the one that was written. The two texts alone do not
    say so, since a token's text may depend on the tokens before it.
    """

    def text(token: int | None) -> str | None:
        return None if token is None else str(fmt.tokenizer.decode([token]))

    def texts(found: Alternatives | None) -> list[Any] | None:
        return None if found is None else [[text(token), logprob] for token, logprob in found]

    columns = dict(vars(scores))
    columns["alternatives"] = [texts(found) for found in scores.alternatives]
    columns["agrees"] = [
        None if token is None else token == written
        for token, written in zip(scores.main_likeliest, ids, strict=True)
    ]
    for name in ("main_likeliest", "reference_likeliest"):
        columns[name] = [text(token) for token in columns[name]]
    return columns


def phase_starts(ids: list[int], plan: PhasePlan) -> list[tuple[int, int]]:
    """(token, phase) where a phase begins; a delimiter belongs to the phase that it ends."""
    starts, phase = [(0, 0)], 0
    for at, token in enumerate(ids[:-1]):
        opened = plan.opened_by.index(token) if token in plan.opened_by else phase
        if opened != phase:
            phase = opened
            starts.append((at + 1, phase))
    return starts


StepInTokens = tuple[int, int, bool, str | None]
"""First token, token after the last one, whether the step is true, its correct text."""


def steps_in_tokens(
    batch: Rollouts, row: int, task: Task, fmt: PromptFormat
) -> list[tuple[StepInTokens, int]]:
    """Steps of a thought by the tokens that they cover, each with the token of its first mistake.

    The mistake is -1 for a step without one. Empty where the task cannot check steps.
    """
    thought: list[int] = []
    places: list[int] = []  # of the thought's tokens among all that the rollout wrote
    first = 0
    for ids in batch.completions(row):
        part = fmt.thought_of(ids)
        if part and part[-1] in (*fmt.summary_ids, *fmt.thought_ids("")):
            part = part[:-1]
        thought += part
        places += range(first, first + len(part))
        first += len(ids)
    text = fmt.thought_text(*batch.completions(row))
    pieces = text_pieces(fmt.tokenizer, thought)
    steps = task.steps(batch.example(row), text)
    if not steps or "".join(pieces) != text or not thought:
        return []
    token_of = [place for place, piece in zip(places, pieces, strict=True) for _ in piece]

    def token_at(character: int) -> int:
        return token_of[min(character, len(token_of) - 1)]

    found: list[tuple[StepInTokens, int]] = []
    for step in steps:
        wrong_at = first_mistake(step, text[step.start : step.end])
        last = max(step.start, step.end - 1)
        span = (token_at(step.start), token_at(last) + 1, step.is_true, step.expected)
        found.append((span, -1 if wrong_at is None else token_at(wrong_at)))
    return found


def first_mistake(step: Step, written: str) -> int | None:
    """Character of the thought where a step is first wrong; None for a step as expected.

    It is the first character that differs from the expected text. Where that is unknown, it is the
    last character of a false step, with which the step was complete.
    """
    if step.expected is None:
        return None if step.is_true else max(step.start, step.end - 1)
    if written == step.expected:
        return None
    return step.start + shared_length(written, step.expected)


def shared_length(first: str, second: str) -> int:
    """Number of characters that two texts begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def mistake(
    example: Example,
    given: str | None,
    right: bool | None,
    steps: list[tuple[StepInTokens, int]],
    tokens: list[str],
    phases: list[list[Any]],
) -> dict[str, Any] | None:
    """The first place where a rollout is wrong; None for one without a known mistake.

    `kind` is `step` (a step that is false, or not the next one), `answer` (all steps are as
    expected, the answer is not) or `missing` (no answer before the limit).
    """
    for (first, end, _, expected), token in steps:
        if token >= 0:
            written = "".join(tokens[first:end]).strip(";\n")
            return {"token": token, "kind": "step", "written": written, "expected": expected}
    if right is not False:
        return None
    if given is None:
        return {"token": len(tokens) - 1, "kind": "missing", "expected": example.answer}
    start = phases[-1][0]
    wrong_at, at = shared_length(given, example.answer), start
    answer = "".join(tokens[start:])
    wrong_at += len(answer) - len(answer.lstrip())
    length = 0
    for at in range(start, len(tokens)):
        length += len(tokens[at])
        if length > wrong_at:
            break
    return {"token": at, "kind": "answer", "written": given, "expected": example.answer}
