"""The draft vocabulary of a new head: the tokens that its training data use most often.

EAGLE-3 heads of servers write 32,000 of 128,000 tokens: the rest is rare, and the output matrix is
most of a small head. The choice depends on the task's first training problems and the tokenizer
alone, so it is the same in every process and every time. A list in a file replaces it.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..rollouts.prompt_format import PromptFormat
from ..tasks.base import Task, first_examples

NUM_COUNTED = 4096
"""Training problems whose solutions are counted."""


def choose_draft_vocabulary(model: Any, fmt: PromptFormat, task: Task, file: str | None) -> None:
    """Give a new head its draft vocabulary, and each of its rows main's own output row.

    Nothing is done for a head that writes the whole vocabulary.

    Raises ValueError for a file that names other tokens than `head.options.draft_vocab_size` of
    main's, and for one that is given to such a head.
    """
    head = model.mtp_head
    if head.draft_tokens is None:
        if file is not None:
            raise ValueError(
                f"model.draft_tokens must be null, got {file!r}: the head writes the whole "
                "vocabulary; remove it, or set head.type=eagle3 and head.options.draft_vocab_size"
            )
        return
    size = len(head.d2t)
    tokens = read_tokens(file) if file is not None else frequent_tokens(task, fmt, size)
    try:
        head.set_draft_tokens(tokens)
    except ValueError as error:
        raise ValueError(f"{error} (model.draft_tokens={file!r})" if file else error) from error
    main = model.output_layers()[0]
    if main.weight.shape[1] == head.lm_head.in_features:
        with torch.no_grad():
            head.lm_head.weight.copy_(main.weight[head.draft_tokens] * main.scale)


def frequent_tokens(task: Task, fmt: PromptFormat, size: int) -> list[int]:
    """The `size` token ids that solutions use most often.

    Delimiters and end tokens come first, since a block ends at them. Among equally frequent tokens,
    and tokens that no solution uses, lower ids come first.
    """
    counts: Counter[int] = Counter()
    for example in first_examples(task, NUM_COUNTED):
        for _, completion in fmt.example_segments(example):
            counts.update(completion)
    marks = sorted(fmt.plan().marks)
    others = sorted(counts.keys() - set(marks), key=lambda token: (-counts[token], token))
    ranked = [*marks, *others]
    rest = (token for token in range(size) if token not in set(ranked))
    return [*ranked, *rest][:size]


def read_tokens(file: str) -> list[int]:
    """Token ids in a JSON list. Raises ValueError for anything else."""
    wrong = f"model.draft_tokens must be a JSON file with a list of token ids, got {file!r}"
    try:
        tokens = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{wrong}: {error}") from error
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ValueError(wrong)
    return tokens
