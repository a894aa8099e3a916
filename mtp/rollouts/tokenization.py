"""Properties of a tokenizer: special tokens that it adds or finds, characters that it lacks."""

import re
from functools import lru_cache
from typing import Any

from transformers import AddedToken


def name_of(tokenizer: Any) -> str:
    """Name of a tokenizer in errors."""
    return f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r}"


def leading_ids(tokenizer: Any) -> list[int]:
    """Ids that `tokenizer(text)` puts before those of the text itself.

    Raises ValueError if the text's own ids cannot be found among them.
    """
    text = "a"
    own = tokenizer.encode(text, add_special_tokens=False)
    ids = tokenizer.encode(text)
    for start in range(len(ids) - len(own) + 1):
        if ids[start : start + len(own)] == own:
            return ids[:start]
    raise ValueError(
        f"{name_of(tokenizer)} reads text differently with special tokens than without; set a "
        "chat template, through which prompts are given"
    )


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the special tokens that a tokenizer finds in text."""
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added | set(tokenizer.all_special_ids)


def add_delimiters(tokenizer: Any, delimiters: list[str]) -> None:
    """Make each delimiter one token, which decoding shows, as Qwen3's and DeepSeek's `</think>`.

    Tools decode with `skip_special_tokens=True`: were delimiters special tokens, these tools would
    run thought and answer together.
    """
    tokenizer.add_tokens([AddedToken(d, special=False, normalized=False) for d in delimiters])


def find_token(tokenizer: Any, text: str, ids: set[int]) -> str | None:
    """The first of the given tokens that a text contains; None if it contains none."""
    if not _written(tokenizer, frozenset(ids)).search(text):
        return None
    found = (i for i in tokenizer.encode(text, add_special_tokens=False) if i in ids)
    return next((str(tokenizer.decode([i])) for i in found), None)


@lru_cache(maxsize=8)
def _written(tokenizer: Any, ids: frozenset[int]) -> re.Pattern[str]:
    """Pattern of text that may be read as one of the tokens; other text is not encoded."""
    words = {str(tokenizer.decode([i])).strip() for i in ids}
    return re.compile("|".join(map(re.escape, sorted(words))), re.IGNORECASE)


def unknown_characters(tokenizer: Any, text: str) -> list[str]:
    """The characters of a text that a tokenizer has no token for."""
    unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {None}
    known = _known(tokenizer)
    new = [c for c in dict.fromkeys(text) if c not in known]
    lacking = [c for c in new if unknown & set(tokenizer.encode(c, add_special_tokens=False))]
    known |= set(new) - set(lacking)
    # A tokenizer of word pieces may know a character only within a word.
    if lacking and not unknown & set(tokenizer.encode(text, add_special_tokens=False)):
        return []
    return lacking


@lru_cache(maxsize=8)
def _known(tokenizer: Any) -> set[str]:
    """Characters that a tokenizer has tokens for; filled as they are found."""
    return set()


class TextPieces:
    """The text that each token adds. Bytes of an unfinished character come with its last one."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.read = self.shown = 0

    def add(self, token: int) -> str:
        """The text that one more token adds."""
        self.ids.append(token)
        piece = self.pending()
        if piece.endswith("�"):
            return ""
        # The tokens before are decoded along, since some tokenizers drop a text's first space.
        self.read, self.shown = self.shown, len(self.ids)
        return piece

    def pending(self) -> str:
        """Text of the tokens that have not been shown."""
        before = self.tokenizer.decode(self.ids[self.read : self.shown])
        return str(self.tokenizer.decode(self.ids[self.read :]))[len(before) :]


def text_pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds; joined they are the whole text."""
    pieces = TextPieces(tokenizer)
    texts = [pieces.add(token) for token in ids]
    if ids:
        texts[-1] += pieces.pending()
    return texts
