"""Conversations in rows: messages are read, checked, and divided into prompts and solutions.

    [{"role": "system", "content": "Be brief."},
     {"role": "user", "content": "2+2="},
     {"role": "assistant", "reasoning_content": "two and two", "content": "4"}]

is a prompt of two messages, the thought `two and two` and the answer `4`. A thought is in a field
of its own or between tags in the content. Thoughts of earlier turns are left out of prompts, as
chat templates of thinking models do.

Left out: tools, images, and messages that a model should begin with (prefill).
"""

from dataclasses import dataclass
from typing import Any

from .base import Message

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant")},
    "human": "user",
    "gpt": "assistant",
}
"""Roles by the names that rows give them; the last two are those of ShareGPT."""
THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Fields of an assistant's message that may hold its thought."""
TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id")


@dataclass(frozen=True)
class Turn:
    """One message. Only an assistant's has a thought."""

    role: str
    content: str
    thought: str | None = None

    @property
    def message(self) -> Message:
        """The message without its thought, as later prompts have it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Tags:
    """Text that begins and ends a thought within a content."""

    opening: str
    closing: str

    @classmethod
    def of(cls, given: list[str]) -> "Tags":
        """Raises ValueError unless two different texts are given."""
        if len(given) != 2 or not all(given) or given[0] == given[1]:
            raise ValueError(
                "task.thought_tags must be two different texts, which begin and end a thought, got "
                f"{given}"
            )
        return cls(*given)

    def split(self, text: str, where: str) -> tuple[str | None, str]:
        """(thought, answer) of `<think>thought</think>answer`; the thought is None without tags.

        The opening tag may be missing, as in completions of a template that writes it. Raises
        ValueError if it is unclear where the thought begins or ends.
        """
        opened, closed = text.count(self.opening), text.count(self.closing)
        if not opened and not closed:
            return None, text.strip()
        before, _, after = text.partition(self.opening) if opened else ("", "", text)
        thought, _, answer = after.partition(self.closing)
        if opened > 1 or closed != 1 or before.strip() or self.opening in answer:
            raise ValueError(
                f"{where} must hold one thought, at its beginning and between {self.opening!r} and "
                f"{self.closing!r}, got {opened} opening and {closed} closing tags in "
                f"{text[:80]!r}; correct the row, or set task.thought_tags to the row's tags"
            )
        return thought.strip() or None, answer.strip()


def is_messages(value: Any) -> bool:
    """True for a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) for m in value)


def read_turns(value: Any, key: str, where: str, tags: Tags) -> list[Turn]:
    """The messages of a row. Raises ValueError naming `key`, the row and the message.

    Fields that are None count as absent: Parquet gives every message the fields of all.
    """
    if not is_messages(value):
        raise ValueError(f"{key} must hold a list of messages, got {value!r:.80} in {where}")
    return [
        _turn(message, f"message {number} of {key} in {where}", tags)
        for number, message in enumerate(value)
    ]


def _turn(message: dict[str, Any], where: str, tags: Tags) -> Turn:
    message = {name: value for name, value in message.items() if value is not None}
    role_field, content_field = "role", "content"
    if "from" in message and "value" in message and "role" not in message:
        role_field, content_field = "from", "value"
    name = message.get(role_field)
    if any(message.get(field) for field in TOOL_FIELDS) or name in ("tool", "function"):
        raise ValueError(f"{where} must not use tools, which are not supported; drop the row")
    if not isinstance(name, str) or name not in ROLES:
        raise ValueError(f"{where} must have a role of {sorted(ROLES)}, got {name!r}")
    if message.get("weight", 1) != 1:
        raise ValueError(
            f"{where} must have the weight 1, got {message['weight']!r}; weights of messages are "
            "not supported: leave the row out, or cut the conversation before this message"
        )
    role, text = ROLES[name], _content(message.get(content_field), where)
    if role != "assistant":
        if not text.strip() and role == "user":
            raise ValueError(f"{where} must hold text, got an empty user message")
        return Turn(role, text.strip())
    thought, answer = tags.split(text, where)
    given = {
        field: _content(message[field], where).strip()
        for field in THOUGHT_FIELDS
        if field in message
    }
    thought = one_thought({**given, "content": thought}, where)
    if not answer:
        raise ValueError(f"{where} must hold an answer, got only {text[:80]!r}; drop the row")
    return Turn(role, answer, thought)


def one_thought(given: dict[str, str | None], where: str) -> str | None:
    """The thought that a row gives in one or several places.

    Raises ValueError if they differ.
    """
    filled = {place: thought for place, thought in given.items() if thought}
    if len(set(filled.values())) > 1:
        raise ValueError(
            f"{where} must have one thought, got different ones in {' and '.join(filled)}; keep one"
        )
    return next(iter(filled.values()), None)


def _content(value: Any, where: str) -> str:
    """A content: text, or a list of parts that are all text."""
    if isinstance(value, list):
        kinds = [part.get("type", "text") if isinstance(part, dict) else None for part in value]
        texts = [part.get("text") if isinstance(part, dict) else None for part in value]
        if any(kind != "text" for kind in kinds) or not all(isinstance(t, str) for t in texts):
            raise ValueError(
                f"{where} must hold text, got parts of the types {kinds}; only text is supported"
            )
        return "".join(t for t in texts if t is not None)
    if not isinstance(value, str):
        raise ValueError(f"{where} must hold text, got {value!r:.80}")
    return value
