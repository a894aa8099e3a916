"""The house's shape: imports point along the data flow, and no package shadows another's."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    ["errors", "cache_mtp", "memory_mtp", "phases_mtp", "records_mtp", "sampling_mtp"]
    + ["attention_mtp", "matrices_mtp", "tasks.base"],
    ["running_mtp", "requests_mtp", "contract_mtp"],
    ["draws_mtp"],
    ["passes_mtp"],
    ["segments_mtp"],
    ["generation_mtp", "branches_mtp"],
    ["tree_search_mtp"],
    ["search_mtp"],
    ["modeling_mtp", "tasks.math_answer", "tasks.solvers", "tasks.running_sum"]
    + ["tasks.continuation"],
    ["tasks.reasoning_gym", "tasks.user_reward"],
    ["tasks.rows"],
    ["tasks", "tokenization"],
    ["text", "batch", "advantage", "optim", "checkpoint", "runtime", "interval"] + ["pretrained"],
    ["logger", "run_folder"],
    ["algorithms.algorithm", "algorithms.ratio"],
    ["algorithms.grpo", "algorithms.dapo", "algorithms.dr_grpo", "algorithms.rloo"]
    + ["algorithms.gspo", "algorithms.cispo", "algorithms.reinforce_pp"],
    ["algorithms"],
    ["rollout", "live"],
    ["legibility", "arms"],
    ["reward", "evaluate", "models"],
    ["evaluate_search", "live_search"],
    ["objectives.scored", "objectives.stream"],
    ["objectives.main_ce", "objectives.head_ce", "objectives.head_kl"]
    + ["objectives.policy", "objectives.leash", "objectives.preserve"],
    ["objectives"],
    ["update", "stage", "report"],
    ["export", "sweep"],
    ["config"],
    ["start"],
    ["run", "examples"],
    ["groups", "reference"],
    ["steps"],
    ["trainer"],
    ["cli_options"],
    ["cli"],
]
"""A module may import those of earlier layers; within a layer none imports another."""


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


def test_every_module_has_its_layer():
    listed = [name for layer in LAYERS for name in layer]
    assert set(modules()) <= set(listed)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_one_way(name):
    rank = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    for other in imported(name, modules()[name]):
        assert rank[other] < rank[name], f"{name} imports {other}"


def test_the_travelling_files_import_nothing_of_mtp_but_each_other():
    travelling = {name: path for name, path in modules().items() if name.endswith("_mtp")}
    assert {"modeling_mtp", "generation_mtp"} < set(travelling)
    for name, path in travelling.items():
        assert imported(name, path) <= set(travelling), name


def test_only_train_and_config_import_hydra():
    users = [
        path.relative_to(ROOT).as_posix()
        for path in [*(ROOT / "mtp").rglob("*.py"), *ROOT.glob("*.py")]
        if "import hydra" in path.read_text() or "from hydra" in path.read_text()
    ]
    assert sorted(users) == ["mtp/config.py", "train.py"]


def test_kernels_is_a_plain_folder_beside_which_transformers_imports():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import transformers; from transformers import LlamaForCausalLM"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
