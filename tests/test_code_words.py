"""The English of the code: words of docstrings, comments and messages, and how docstrings begin."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from house_words import house_words

ROOT = Path(__file__).parents[1]
FOLDERS = ("mtp", "kernels", "benchmarks", "docs")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))
FOLDED = ("Of ", "What ", "Those ", "So ", "As ", "Where ", "How ", "By ")
"""Beginnings of docstrings that are no sentence, or are one that must be read twice."""


def strings(text: str) -> Iterator[tuple[ast.Constant, bool]]:
    """String constants; True for docstrings of modules, classes, functions and fields."""
    tree = ast.parse(text)
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, id(node) in statements


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """(line, content) of the docstrings."""
    for node, is_docstring in strings(text):
        if is_docstring:
            yield node.lineno, node.value


def messages(text: str) -> Iterator[tuple[int, str]]:
    """(line, content) of the other strings that may be a sentence: they hold two spaces or more."""
    for node, is_docstring in strings(text):
        if not is_docstring and node.value.strip().count(" ") > 1:
            yield node.lineno, node.value


def comments(text: str) -> Iterator[tuple[int, str]]:
    """(line, content) of the comments."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def complaints(path: Path, prose: Iterator[tuple[int, str]]) -> list[str]:
    """Banned words in pieces of prose, with their places; code in backticks may hold any."""
    found = []
    for first, content in prose:
        content = re.sub(r"`[^`]*`", lambda code: "\n" * code[0].count("\n"), content)
        for number, line in enumerate(content.split("\n"), first):
            found += [f"{path.relative_to(ROOT)}:{number}: {word}" for word in house_words(line)]
    return found


@pytest.mark.parametrize("read", [docstrings, comments, messages])
def test_sources_use_the_words_of_the_field(read):
    paths = [*SOURCES, ROOT / "train.py"]
    found = [word for path in paths for word in complaints(path, read(path.read_text()))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("read", [docstrings, comments])
def test_tests_use_the_words_of_the_field(read):
    found = [word for path in TESTS for word in complaints(path, read(path.read_text()))]
    assert not found, "\n".join(found)


def test_configs_use_the_words_of_the_field():
    found = []
    for path in CONFIGS:
        lines = path.read_text().split("\n")
        prose = [(n, line.partition("#")[2]) for n, line in enumerate(lines, 1)]
        found += complaints(path, iter(prose))
    assert not found, "\n".join(found)


def test_docstrings_stand_alone():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {content.splitlines()[0]}"
        for path in [*SOURCES, *TESTS, ROOT / "train.py"]
        for number, content in docstrings(path.read_text())
        if content.startswith(FOLDED)
    ]
    assert not found, "\n".join(found)


def test_a_banned_word_is_found_unless_it_is_code_or_a_term_of_the_field():
    where = ROOT / "train.py"
    text = "The head hears main.\n`told` may stand\nin a progress bar."
    assert complaints(where, iter([(7, text)])) == [
        "train.py:7: 'hears'; write reads, attends to",
        "train.py:8: 'stand'; write is accepted",
    ]
