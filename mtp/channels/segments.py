"""Contexts of segments whose memory is given as vectors: embedded text, or a channel's own."""

from typing import Any

from torch import Tensor

from ..modeling.segments import summary_marks
from ..rollouts.prompt_format import PromptFormat
from ..tasks.base import Example
from .reading import Inputs, embedded


def context(
    fmt: PromptFormat, model: Any, prompt: list[int], memory: Tensor | None, scored: list[int]
) -> Inputs:
    """A segment's inputs, and the ids scored after them.

    memory: [n, D] vectors in place of the memory file's text; None for the first segment.
    """
    if memory is None:
        return Inputs(prompt, embedded(model, []), [], scored)
    opener, closer = summary_marks(fmt.plan())
    assert fmt.opener is not None
    return Inputs([*prompt, opener], memory, [closer, fmt.delimiter_id(fmt.opener)], scored)


def memory_ids(fmt: PromptFormat, example: Example, context: list[int]) -> list[int] | None:
    """The memory file in the context of a later segment; None in the first one, and where the
    context has recent tokens of the thought too.
    """
    _, closer = summary_marks(fmt.plan())
    prompt = fmt.question_ids(example)
    if context == prompt or fmt.segments.recent_tokens:
        return None
    return context[len(prompt) + 1 : context.index(closer, len(prompt))]
