"""Rows as examples: which columns hold the prompt, the answer and the thought.

A row has a prompt and an answer, or a whole conversation; perhaps a thought, and any other columns,
which a reward may read. A row that could be read in two ways is refused.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from .base import Example, Message, TaskConfig, fingerprint
from .messages import Tags, Turn, is_messages, one_thought, read_turns
from .row_files import Row, WrittenFloat


@dataclass(kw_only=True)
class ColumnsConfig(TaskConfig):
    """The columns of rows."""

    prompt_column: str | None = "prompt"
    """Column of the prompt: text, or a list of messages whose last one is the user's."""
    answer_column: str | None = "answer"
    """Column of the answer: text, a number, or a list of one assistant message."""
    thought_column: str = "thought"
    """Column of the thought, which rows may lack. Columns within columns are written
    `outer.inner`."""
    messages_column: str | None = "messages"
    """Column of a whole conversation, in place of prompt and answer. If an assistant's message is
    the last, it is the answer; if the user's is, the answer is in `answer_column`."""
    turns: str = "last"
    """Answers of a conversation that are trained on: the `last`, or `all`, each an example whose
    prompt is the conversation before it."""
    system_column: str | None = None
    """Column of a system message, which rows may lack."""
    thought_tags: list[str] = field(default_factory=lambda: ["<think>", "</think>"])
    """Text before and after a thought within an answer."""

    def check_columns(self) -> None:
        """Raises ValueError naming the key of an impossible value."""
        if self.turns not in ("last", "all"):
            raise ValueError(f"task.turns must be last or all, got {self.turns!r}")
        if self.prompt_column is None and self.messages_column is None:
            raise ValueError("task.prompt_column or task.messages_column must name a column")
        Tags.of(self.thought_tags)


def to_examples(
    row: dict[str, Any], config: ColumnsConfig, where: str
) -> list[tuple[str, Example]]:
    """A row's examples, each with the hash that decides its split; their columns are the whole row.

    All examples of a conversation have the hash of its first question, since the prompts of later
    ones hold earlier answers. Raises ValueError naming key and row.
    """
    conversation = _find(row, config.messages_column) or None
    if conversation is None:
        example = _single(row, config, where)
        return [(fingerprint(example), example)]
    if _find(row, config.prompt_column) is not None:
        raise ValueError(
            f"{where} must have a prompt or messages, got both columns {config.prompt_column!r} "
            f"and {config.messages_column!r}; set the key of the one to be left out to null: "
            "task.prompt_column or task.messages_column"
        )
    key = "task.messages_column"
    turns = _with_system(read_turns(conversation, key, where, _tags(config)), row, config, where)
    _refuse_tools(row, where)
    examples = [
        _example(turns[:at], turn.content, turn.thought, row, where)
        for at, turn in enumerate(turns)
        if turn.role == "assistant" and (config.turns == "all" or at == len(turns) - 1)
    ]
    answer, last = _find(row, config.answer_column), turns[-1]
    if last.role != "assistant":
        text, thought = _solution(row, config, where)
        examples.append(_example(turns, text, thought, row, where))
    else:
        text, thought = last.content, _given_thought(row, config, where)
        if answer is not None:
            text, thought = _solution(row, config, where)
        if text != last.content:
            raise ValueError(
                f"{where} must have one answer, got {str(answer)[:80]!r} in "
                f"{config.answer_column!r} and another in its last message; set "
                "task.answer_column=null to use the message (a reward still gets the column), or "
                "cut the message off"
            )
        thoughts = {"the last message": last.thought, "the other columns": thought}
        examples[-1] = replace(examples[-1], thought=one_thought(thoughts, where))
    if config.turns == "last":
        return [(fingerprint(example), example) for example in examples]
    opening = fingerprint(examples[0])
    return [(opening, example) for example in examples]


def examples_of(rows: Iterable[Row], config: ColumnsConfig) -> list[tuple[str, Example]]:
    """The examples of rows, see `to_examples`."""
    return [pair for where, row in rows for pair in to_examples(row, config, where)]


def first_questions(pairs: Iterable[tuple[str, Example]], number: int) -> list[Example]:
    """The first test examples in the order of their hashes.

    A question with several solutions counts once, with its first one: tests and intervals take
    problems to be independent of each other.
    """
    found: dict[str, Example] = {}
    for _, example in sorted(pairs, key=lambda pair: pair[0]):
        found.setdefault(fingerprint(example), example)
    return list(found.values())[:number]


def in_test_share(question_hash: str, share: float) -> bool:
    """True if a question, by its hexadecimal hash, is in the held-out share."""
    return int(question_hash[:13], 16) < share * 16**13


def _single(row: dict[str, Any], config: ColumnsConfig, where: str) -> Example:
    """A row with a prompt and an answer."""
    value = _column(row, config, "prompt_column", where)
    answer, thought = _solution(row, config, where)
    if is_messages(value):
        turns = read_turns(value, "task.prompt_column", where, _tags(config))
        _refuse_tools(row, where)
        turns = _with_system(turns, row, config, where)
        return _example(turns, answer, thought, row, where)
    prompt = _text(value, "prompt_column", where)
    if not prompt:
        raise ValueError(f"task.prompt_column must hold text, got an empty prompt in {where}")
    turns = _with_system([Turn("user", prompt)], row, config, where)
    if len(turns) > 1:
        return _example(turns, answer, thought, row, where)
    return Example(prompt, answer, thought, _columns(row), where)


def _example(
    before: list[Turn], answer: str, thought: str | None, row: dict[str, Any], where: str
) -> Example:
    """The answer to a conversation, whose last message must be the user's."""
    if not before or before[-1].role != "user":
        roles = ", ".join(turn.role for turn in before) or "none"
        raise ValueError(
            f"the messages before an answer must end with the user's, got the roles {roles} in "
            f"{where}; give conversations with answers in task.messages_column, and join messages "
            "of the assistant that follow each other"
        )
    messages: tuple[Message, ...] = tuple(turn.message for turn in before)
    prompt = _text(before[-1].content, "prompt_column", where)
    return Example(prompt, answer, thought, _columns(row), where, messages)


def _solution(row: dict[str, Any], config: ColumnsConfig, where: str) -> tuple[str, str | None]:
    """(answer, thought) of a row, each from its column; the thought perhaps from the answer."""
    value = _column(row, config, "answer_column", where)
    given = _given_thought(row, config, where)
    inner, tags = None, _tags(config)
    if is_messages(value):
        turns = read_turns(value, "task.answer_column", where, tags)
        if len(turns) != 1 or turns[0].role != "assistant":
            raise ValueError(
                f"task.answer_column must hold one assistant message, got the roles "
                f"{', '.join(turn.role for turn in turns)} in {where}; give whole conversations in "
                "task.messages_column"
            )
        answer, inner = turns[0].content, turns[0].thought
    else:
        answer = _text(value, "answer_column", where)
        if answer.startswith(tags.opening):
            inner, answer = tags.split(answer, f"the answer of {where}")
    if not answer.strip():
        raise ValueError(
            f"task.answer_column must hold text, got an empty answer in {where}: it would be "
            "learned as one; fill it or drop the row"
        )
    return answer, one_thought({"task.thought_column": given, "the answer": inner}, where)


def _given_thought(row: dict[str, Any], config: ColumnsConfig, where: str) -> str | None:
    """The thought in its own column; None if there is none."""
    thought = _find(row, config.thought_column)
    return None if thought is None else _text(thought, "thought_column", where)


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """The columns as a reward gets them: floats of JSON, however many digits were written."""

    def plain(value: Any) -> Any:
        if isinstance(value, WrittenFloat):
            return float(value)
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list) else value

    return {name: plain(value) for name, value in row.items()}


def _tags(config: ColumnsConfig) -> Tags:
    return Tags.of(config.thought_tags)


def _with_system(
    turns: list[Turn], row: dict[str, Any], config: ColumnsConfig, where: str
) -> list[Turn]:
    """The messages after that of `system_column`. Raises ValueError if they have their own."""
    system = _find(row, config.system_column)
    if system is None:
        return turns
    if turns[0].role in ("system", "developer"):
        raise ValueError(
            f"{where} must have one system message, got one in {config.system_column!r} and one in "
            "its messages; set task.system_column=null or take one out"
        )
    return [Turn("system", _text(system, "system_column", where)), *turns]


def _refuse_tools(row: dict[str, Any], where: str) -> None:
    """Raises ValueError for columns that change how a conversation is rendered."""
    for name in ("tools", "chat_template_kwargs"):
        if row.get(name):
            raise ValueError(
                f"{where} must not have the column {name!r} filled: it changes the prompt, which "
                "is not supported; drop the row or the column"
            )


def _find(row: Any, path: str | None) -> Any:
    """row["a"]["b"] for the path `a.b`; None if it is not there."""
    if path is None:
        return None
    if isinstance(row, dict) and path in row:
        return row[path]
    outer, dot, inner = path.partition(".")
    return _find(row[outer], inner) if dot and isinstance(row, dict) and outer in row else None


def _column(row: dict[str, Any], config: ColumnsConfig, key: str, where: str) -> Any:
    path = getattr(config, key)
    value = _find(row, path)
    if value is None:
        raise ValueError(
            f"task.{key} must name a filled column, got {path!r}, but {where} has "
            f"{sorted(k for k, v in row.items() if v is not None)}"
            + ("; or give conversations in task.messages_column" if key == "prompt_column" else "")
        )
    return value


def _text(value: Any, key: str, where: str) -> str:
    """Text or a number, stripped. Whole numbers get no decimal point, no number an exponent."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError(
            f"task.{key} must hold text or numbers, got {value!r:.80} in {where}"
            + ("; a prompt may be a list of messages too" if key == "prompt_column" else "")
        )
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise ValueError(
                f"task.{key} must hold finite numbers, got {value} in {where}; correct or drop "
                "the row"
            )
        # A float's shortest digits that identify it: 1e16, not its exact value
        value = f"{Decimal(repr(value) if isinstance(value, float) else value):f}"
        value = value.rstrip("0").rstrip(".") if "." in value else value
        value = "0" if value == "-0" else value
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"task.{key} must hold Unicode text, got the lone surrogate {text[error.start]!r} in "
            f"{where}; correct the row"
        ) from None
    return text
