"""Words that prose may not use, in pages and in code, and a search for them."""

import re

HOUSE_WORDS = {
    "hear, hears, heard": "reads, attends to",
    "listen, listens, listening": "reads",
    "tell, tells, told": "conditions on, encodes, names",
    "say the same, says the same": "has the same tokens",
    "leash, leashes": "reference KL",
    "judge, judges, judged": "verifier (answers), scoring function (branches)",
    "drawn, drew": "sampled, initialised",
    "go on, goes on, going on, went on": "continues, resumes",
    "door, doors": "loading path",
    "travel, travels, travelling": "ship",
    "figures": "metrics",
    "arm, arms": "variant, ablation",
    "bar, bars": "target",
    "surprise, surprising": "negative log-likelihood",
    "so many, so much": "this many, up to n, n per pass",
    "stand, stands, stood": "is accepted",
    "honour, honours, honoured": "supported",
}
"""Words that prose may not use (quoted code may), and the field's words for them."""

TECHNICAL = ("progress bar", "progress bars", "bar chart", "stand-in", "stand alone")
"""Phrases with a banned word that are the field's own."""

_WORDS = [word for words in HOUSE_WORDS for word in words.split(", ")]
_INSTEAD = {word: instead for words, instead in HOUSE_WORDS.items() for word in words.split(", ")}


def _either(words: tuple[str, ...] | list[str]) -> re.Pattern[str]:
    return re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)


_BANNED, _ALLOWED = _either(_WORDS), _either(sorted(TECHNICAL, key=len, reverse=True))


def house_words(prose: str) -> list[str]:
    """A complaint for each banned word in a line of prose that holds no code."""
    found = _BANNED.findall(_ALLOWED.sub("", prose))
    return [f"{word!r}; write {_INSTEAD[word.lower()]}" for word in found]
