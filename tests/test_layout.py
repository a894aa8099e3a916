"""The house's shape: imports point along the data flow, and no package shadows another's."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    {"common", "plan"},
    {"tasks"},
    {"modeling"},
    {"rollouts"},
    {"training", "reports"},
    {"evaluation"},
    {"hub"},
    {"config"},
    {"run"},
    {"groups", "reference"},
    {"steps"},
    {"stages"},
    {"channels"},
    {"trainer"},
    {"cli"},
]
"""Folders of mtp, and its files, from the ground up: each imports those of lower floors only."""


def modules() -> dict[str, Path]:
    found = {}
    for path in (ROOT / "mtp").rglob("*.py"):
        parts = path.relative_to(ROOT / "mtp").with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    found.pop("")
    return found


def imported(name: str, path: Path) -> set[str]:
    """Modules of mtp that a module imports, whether at its top or within a function."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                out.add(".".join([*base, *(node.module or "").split(".")]).strip("."))
            elif node.module and node.module.split(".")[0] == "mtp":
                out.add(node.module.removeprefix("mtp").strip("."))
    return out - {""}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_folder_and_file_has_its_floor():
    assert {room(name) for name in modules()} == set().union(*FLOORS)


def test_files_of_mtp_itself_tell_the_story_of_a_run():
    files = {path.stem for path in (ROOT / "mtp").glob("*.py")} - {"__init__"}
    assert files == {"config", "run", "reference", "groups", "steps", "trainer"}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_one_way(name):
    floor = {folder: i for i, folders in enumerate(FLOORS) for folder in folders}
    for other in imported(name, modules()[name]):
        if room(other) != room(name):
            assert floor[room(other)] < floor[room(name)], f"{name} imports {other}"


def test_no_two_files_import_each_other():
    """Within a folder, too, there is no circle."""
    graph = {name: imported(name, path) & set(modules()) for name, path in modules().items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_what_ships_with_checkpoints_imports_only_itself():
    for name, path in modules().items():
        if room(name) == "modeling":
            assert {room(other) for other in imported(name, path)} <= {"modeling"}, name


def test_hydra_is_imported_by_one_file():
    users = [
        path.relative_to(ROOT).as_posix()
        for path in [*(ROOT / "mtp").rglob("*.py"), *ROOT.glob("*.py")]
        if re.search(r"^\s*(import|from) hydra", path.read_text(), re.MULTILINE)
    ]
    assert users == ["mtp/cli/hydra.py"]


def test_kernels_is_a_plain_folder_beside_which_transformers_imports():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import transformers; from transformers import LlamaForCausalLM"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
