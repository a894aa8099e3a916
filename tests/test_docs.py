"""What README and docs name exists, and their prose uses the field's words."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOTS = [ROOT, ROOT / "kernels", ROOT / "kernels" / "mtp_kernels"]
"""Folders that a path in a page may begin from."""

HOUSE_WORDS = [
    (r"hears?|heard|listens?", "reads, attends to"),
    (r"told|tells?", "conditioned on, encodes, parsed from, named"),
    (r"sa(y|ys|id) the same", "has the same tokens"),
    (r"leash(es)?", "reference KL"),
    (r"judge(s|d)?|judging", "verifier, verifies; scoring function, scores"),
    (r"drawn|draws?", "sampled, initialised, distilled"),
    (r"go(es)? on", "continues, resumes"),
    (r"doors?", "loading path"),
    (r"travels?", "ships"),
    (r"figures?", "metrics"),
    (r"arms?", "variants, ablations"),
    (r"bars?", "targets"),
    (r"surpris(e|es|ing)", "negative log-likelihood"),
    (r"honou?red", "supported"),
    (r"so (many|much) (per|for|from)", "this many, n per ..."),
    (r"(?<=[.:] )So", "therefore"),
]
"""Words of ours that strangers stumble over, and the field's words for them."""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """A page without its code, links' targets and comments."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name(page)} links to {target}, and there is no such file"
        if anchor:
            assert anchor in anchors(linked), f"{name(page)}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_pages_name_exist(page):
    named = re.findall(r"[\w./-]*\w/[\w./-]+\.(?:py|md|yaml|png|sh)\b", page.read_text())
    for path in {p for p in named if not p.startswith(("runs/", "/")) and "NAME" not in p}:
        roots = [page.parent, *ROOTS]
        assert any((root / path).exists() for root in roots), f"{name(page)} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_that_pages_run_exist(page):
    for module in re.findall(r"python -m (mtp[\w.]*)", page.read_text()):
        assert find_spec(module), f"{name(page)} runs {module}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_choices_of_groups_that_pages_name_exist(page):
    """`experiment=NAME`, and the other groups of conf/ but model, a keyword of transformers too."""
    folders = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    groups = "|".join(sorted(folders - {"model"}))
    for group, choices in re.findall(rf"(?<![\w.])({groups})=([a-z][\w,/]*)", page.read_text()):
        for choice in choices.split(","):
            path = ROOT / "conf" / group / f"{choice}.yaml"
            assert path.exists(), f"{name(page)} names {group}={choice}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_prose_uses_the_fields_words(page):
    text = prose(page.read_text())
    for words, instead in HOUSE_WORDS:
        found = re.search(rf".*\b({words})\b.*", text, flags=re.IGNORECASE)
        assert not found, f"{name(page)}: {found[1]!r}; write {instead}: {found[0]}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_of_prose_are_at_most_100_wide(page):
    """Tables, headings, links and code may be wider."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for line in text.splitlines():
        is_prose = not line.startswith(("|", "#", "    ", "![")) and "](" not in line
        assert len(line) <= 100 or not is_prose, f"{name(page)}: {line}"


def test_the_readme_is_one_short_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
