"""The site: the page of all settings, the pages that are made when it is built, the notebook."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from config_reference import Key, page, sections
from house_words import house_words

from mtp.config import RunConfig
from mtp.reports.loggers import SINKS
from mtp.tasks import TASK_CONFIGS
from mtp.training.stage import StageConfig

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def keys() -> dict[str, list[Key]]:
    """Entries of the page by key; a key of several tasks has several."""
    found: dict[str, list[Key]] = {}
    for section in sections(RunConfig):
        for key in section.keys:
            found.setdefault(key.key, []).append(key)
    return found


def leaves(node: object, prefix: str) -> list[str]:
    """Keys below a dataclass, found by walking over its values and not over its types."""
    if not is_dataclass(node):
        return [prefix]
    names = [(f.name, getattr(node, f.name)) for f in fields(node)]
    return [key for name, value in names for key in leaves(value, f"{prefix}.{name}".strip("."))]


def test_every_key_of_a_run_is_on_the_page():
    stage = [f"stages.NAME.{key}" for key in leaves(StageConfig(), "")]
    tasks = [key for config in TASK_CONFIGS.values() for key in leaves(config(), "task")]
    sinks = [
        key
        for name, kind in SINKS.items()
        for key in leaves(kind.config(), f"logger.sinks.{name}")
        if key != f"logger.sinks.{name}"
    ]
    expected = {*leaves(RunConfig(), ""), *stage, *tasks, *sinks} - {"stages", "decoding.phases"}
    found, written = keys(), page()
    assert expected - set(found) == set()
    for key in expected:
        assert f"| `{key}` |" in written


def test_every_key_has_a_meaning_in_the_words_of_the_field():
    for key, entries in keys().items():
        for entry in entries:
            assert entry.meaning, f"{key} has no docstring"
            assert not house_words(entry.meaning), key


def test_an_entry_has_type_default_bounds_and_docstring():
    (lr,) = keys()["stages.NAME.optimizers.main.lr"]
    assert (lr.type, lr.default, lr.bounds) == ("float", "0.001", "≥ 0, ≤ 1000")
    (source,) = keys()["model.source"]
    assert (source.type, source.default, source.bounds) == ("str | None", "null", "")
    assert source.meaning.startswith("Hub id or local folder of a pretrained checkpoint")
    (taps,) = keys()["head.taps"]
    assert (taps.type, taps.bounds) == ("list[int] | None", "≥ 0")
    (phase,) = keys()["decoding.phases.NAME.max_tokens"]
    assert (phase.type, phase.default, phase.bounds) == ("int | None", "null", "≥ 1")
    seeds = {entry.meaning for entry in keys()["task.seed"]}
    assert len(seeds) > 1  # each task describes its own


def test_a_page_that_loads_from_other_hosts_is_found():
    hooks = pytest.importorskip("hooks", reason="pip install '.[docs]'")
    html = (
        '<script src="https://cdn.x/a.js"></script><a href="https://x.org">x</a><link href=a.css>'
    )
    assert hooks.loaded_from_elsewhere(html) == ["https://cdn.x/a.js"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_have_no_outputs_in_git_and_use_the_words_of_the_field(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not house_words("".join(cell["source"]))
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_fast_mode_works_in_it(path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": ROOT}}).execute()
    shown = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "rl    fast:" in shown
    assert "LlamaForCausalLM" in shown


def test_the_script_of_the_tutorial_makes_the_row_that_it_shows(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "tutorial.md").read_text()
    script = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "boxes.py", "exec"), {})
    lines = (tmp_path / "boxes.jsonl").read_text().splitlines()
    assert lines[0] in text and len(lines) == 2500
    config = TASK_CONFIGS["rows"](source="boxes.jsonl")
    example = config.build().example("train", 0)
    product, total = (step.split(" = ") for step in example.thought.split("; "))
    assert eval(product[0]) == int(product[1]) and eval(total[0]) == int(total[1])
    assert total[1] == example.answer
