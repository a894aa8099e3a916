"""Rules for Markdown that can be checked: words, links, paths, experiments, width."""

import re
from pathlib import Path

import pytest
from house_words import house_words

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def without_code(text: str) -> str:
    """Prose and tables of a page: fenced and indented blocks, inline code and link targets removed.

    The number of lines stays.
    """
    kept, fenced, in_list = [], False, False
    for line in text.split("\n"):
        if line.startswith("```"):
            fenced, line = not fenced, ""
        in_list = bool(re.match(r"\s{0,3}([-*]|\d+\.) ", line)) or (in_list and line.strip() != "")
        is_block = line.startswith("    ") and not in_list
        kept.append("" if fenced or is_block else line)
    text = re.sub(r"`[^`]*`", "", "\n".join(kept))
    return re.sub(r"\]\([^)]*\)", "]", text)


def anchors(text: str) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_uses_the_words_of_the_field(page):
    found = []
    for number, line in enumerate(without_code(page.read_text()).split("\n"), 1):
        found += [f"{page.name}:{number}: {complaint}" for complaint in house_words(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if heading:
            assert heading in anchors(path.read_text()), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_paths_exist(page):
    folders = "mtp|tests|benchmarks|conf|docs|kernels"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]*\w", page.read_text()):
        if "NAME" in path:
            continue
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_experiments_exist(page):
    for name in re.findall(r"experiment=([\w/,]+(?:\.\w+)*)", page.read_text()):
        for one in name.split(","):
            assert one == "NAME" or experiment_exists(one), f"{page.name} names experiment={one}"


def experiment_exists(name: str) -> bool:
    return (ROOT / "conf/experiment" / f"{name}.yaml").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_has_one_width(page):
    text = page.read_text()
    for number, line in enumerate(without_code(text).split("\n"), 1):
        whole = text.split("\n")[number - 1]
        if line and not line.startswith(("|", "#", "!")):
            assert len(whole) <= 100, f"{page.name}:{number} has {len(whole)} characters"


def test_readme_is_one_read():
    assert len((ROOT / "README.md").read_text().split("\n")) <= 121
