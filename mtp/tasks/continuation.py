"""Parts of plain text that a model continues; no answer is right or wrong.

A drafter is trained and measured on text that main writes by itself. The source is text files or,
by default, Python's own documentation of the language (`pydoc_data.topics`, half a megabyte of
English prose and code that comes with every Python).

The text is cut into blocks, and the hash of a block decides its split. A part lies within one block
and begins and ends at white space; a test part occurs nowhere in the training blocks.
"""

import glob
import hashlib
import random
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common.bounds import bounded
from .base import Example, Split, Task, TaskConfig, check_content, content_hash, read_utf8

_MAX_DRAWS = 1000
"""Maximum number of test parts sampled to find one that the training text does not contain."""


@dataclass(kw_only=True)
class ContinuationConfig(TaskConfig):
    """Settings for `task=continuation`, such as `task=continuation task.files=[docs/*.md]`."""

    files: list[str] = field(default_factory=list)
    """Patterns of UTF-8 text files, `**` for any folders; empty: Python's documentation."""
    min_characters: int = bounded(100, at_least=1)
    """Minimum length of a part."""
    max_characters: int = bounded(400, at_least=1)
    """Maximum length of a part; it is sampled uniformly between the two, and the part ends at white
    space."""
    block_characters: int = bounded(4000, at_least=2)
    """Number of characters of the blocks that the text is divided into, at white space."""
    test_share: float = bounded(0.1, above=0, below=1)
    """Share of the blocks that are held out."""
    seed: int = bounded(0, at_least=0, at_most=2**63 - 1)
    """Seed of the parts; the splits do not depend on it."""

    def build(self) -> "Continuation":
        if not 1 <= self.min_characters <= self.max_characters:
            raise ValueError(
                "task.min_characters and task.max_characters must satisfy 1 <= min <= max, got "
                f"{self.min_characters}, {self.max_characters}"
            )
        if self.block_characters < 2 * self.max_characters:
            raise ValueError(
                f"task.block_characters must be at least {2 * self.max_characters}, twice "
                f"task.max_characters, got {self.block_characters}"
            )
        if not 0 < self.test_share < 1:
            raise ValueError(f"task.test_share must be between 0 and 1, got {self.test_share}")
        return Continuation(self)


class Continuation(Task):
    """Parts of plain text as prompts, see the module."""

    name = "continuation"
    has_verifier = False

    def __init__(self, config: ContinuationConfig):
        self.config = config
        self.blocks: dict[Split, list[str]] = {"train": [], "test": []}
        """Texts at least as long as the longest part, each once."""
        found = [block for text in texts(config.files) for block in self._blocks(text)]
        for block in dict.fromkeys(found):
            byte = int.from_bytes(hashlib.sha256(block.encode()).digest()[:4], "big")
            is_test = byte < config.test_share * 2**32
            self.blocks["test" if is_test else "train"].append(block)
        for split, blocks in self.blocks.items():
            if not blocks:
                raise ValueError(
                    f"task.files must hold text for both splits, but none of {len(found)} blocks "
                    f"is in {split}; give more text, lower task.block_characters or change "
                    "task.test_share"
                )
        self._train_text = "\n".join(self.blocks["train"])

    def _blocks(self, text: str) -> list[str]:
        """The blocks of one text; a last one that is too short for a part is left out."""
        size = self.config.block_characters
        blocks = []
        at = 0
        while at < len(text):
            end = cut(text, at, size)
            blocks.append(text[at:end].strip())
            at = end
        return [block for block in blocks if len(block) >= self.config.max_characters]

    @cached_property
    def _content(self) -> str:
        blocks = (*self.blocks["train"], *self.blocks["test"])
        return content_hash(Example(block, "") for block in blocks)

    def bookmark(self, position: int) -> dict[str, Any]:
        return {"content": self._content}

    def restore(self, bookmark: dict[str, Any]) -> None:
        check_content(bookmark, self._content, "task.files")

    def size(self, split: Split) -> int | None:
        return None

    def example(self, split: Split, index: int) -> Example:
        """A part of a block; its `answer` is the block's continuation, for supervised stages."""
        config = self.config
        rng = random.Random(f"{config.seed}/{split}/{index}")
        for _ in range(_MAX_DRAWS):
            block = rng.choice(self.blocks[split])
            size = rng.randint(config.min_characters, config.max_characters)
            start = begin(block, rng.randint(0, len(block) - size))
            end = cut(block, start, size)
            prompt = block[start:end].strip()
            rest = block[end : cut(block, end, config.max_characters)].strip()
            is_long = len(prompt) >= config.min_characters and rest
            if is_long and (split == "train" or prompt not in self._train_text):
                return Example(prompt, rest)
        raise ValueError(
            f"task.files hold no {split} stretch of {config.min_characters} characters or more "
            "that the training text does not hold as well; give text that repeats itself less, or "
            "raise task.min_characters"
        )

    def score(self, example: Example, answer: str) -> float:
        """Always 0: no answer is right."""
        return 0.0


def texts(patterns: list[str]) -> list[str]:
    """The files' texts in the order of their paths, or Python's documentation of the language.

    Raises ValueError if a pattern matches no file, or a file is not UTF-8.
    """
    if not patterns:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    paths: set[str] = set()
    for pattern in patterns:
        matched = [p for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
        if not matched:
            raise ValueError(f"task.files must be patterns of text files, got {pattern!r}: no file")
        paths.update(matched)
    return [read_utf8(Path(path), "task.files") for path in sorted(paths)]


def cut(text: str, start: int, size: int) -> int:
    """End of the text of `size` characters from `start`: the last white space in it.

    At the very end of the text, or if there is no white space, it has its full size.
    """
    end = start + size
    if end >= len(text) or text[end].isspace():
        return min(end, len(text))
    spaces = [match.start() for match in re.finditer(r"\s", text[start:end])]
    return start + spaces[-1] if spaces and spaces[-1] else end


def begin(text: str, at: int) -> int:
    """The first beginning of a word at or before a position."""
    while at and not text[at - 1].isspace():
        at -= 1
    return at
