"""Changes of a thought, to see whether the answer depends on it. Pure functions of text and ids.

Early answering, adding mistakes and filler follow Lanham et al. 2023, "Measuring Faithfulness in
Chain-of-Thought Reasoning", arXiv 2307.13702.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
"""A number in a text, with its decimals and commas."""


def first_part(ids: list[int], at: float) -> list[int]:
    """The first tokens of a thought, a share `at` of them, rounded to whole tokens."""
    return ids[: int(at * len(ids) + 0.5)]


def with_filler(ids: list[int], at: float, filler: int) -> list[int]:
    """A thought whose tokens after the first share `at` are one repeated token.

    It keeps its length, so a model has as many positions to compute in as before.
    """
    kept = first_part(ids, at)
    return kept + [filler] * (len(ids) - len(kept))


def choose_filler(thoughts: Iterable[list[int]], text_of: Callable[[int], str]) -> int | None:
    """The most frequent token of some thoughts whose text holds no letter and no digit.

    The most frequent of all if each holds one; None for no tokens. The lower id wins a tie.
    """
    counts = Counter(token for ids in thoughts for token in ids)
    neutral = {t: n for t, n in counts.items() if not any(map(str.isalnum, text_of(t)))}
    found = neutral or counts
    return min(found, key=lambda token: (-found[token], token)) if found else None


class Mistake(NamedTuple):
    """One changed number of a thought, and the text up to it."""

    at: float
    """The place that the number belongs to, a share of the thought's characters."""
    changed: str
    """The thought up to the number's end, with one of its digits changed."""
    unchanged: str
    """The same text as it was written."""


def mistakes(text: str, places: list[float], rng: random.Random) -> list[Mistake]:
    """At most one mistake for each of some `places`, shares of the text in rising order.

    Every number of the text belongs to the place that is nearest to its end. Of several at one
    place the nearest is changed, the earlier one of a tie.
    """
    nearest: dict[float, re.Match[str]] = {}

    def distance(match: re.Match[str], place: float) -> float:
        return abs(match.end() / len(text) - place)

    for match in NUMBER.finditer(text):
        place = min(places, key=lambda place: distance(match, place))
        if place not in nearest or distance(match, place) < distance(nearest[place], place):
            nearest[place] = match
    found = []
    for place in sorted(nearest):
        match = nearest[place]
        start, end = match.span()
        written = text[start:end]
        found.append(Mistake(place, text[:start] + changed_digit(written, rng), text[:end]))
    return found


def changed_digit(number: str, rng: random.Random) -> str:
    """A number of the same length with another digit at one place; no leading zero is made."""
    at = rng.choice([i for i, character in enumerate(number) if character.isdigit()])
    leads = at == 0 and len(number) > 1 and number[1].isdigit()
    digits = [d for d in "0123456789"[leads:] if d != number[at]]
    return number[:at] + rng.choice(digits) + number[at + 1 :]
