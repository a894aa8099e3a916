"""The package is self-contained: its imports, and that its folder shadows nothing."""

import ast
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "kernels"
ALLOWED = {"torch", "triton", "mtp_kernels"} | set(sys.stdlib_module_names)


def test_imports_are_torch_and_triton_only_and_triton_only_in_its_own_files():
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top in ALLOWED, f"{path} imports {name}"
                if top == "triton":
                    assert path.name in ("triton.py", "tiles.py", "aot.py"), f"{path}: {name}"


def test_importing_it_imports_neither_triton_nor_transformers():
    program = "import sys, mtp_kernels; assert not {'triton', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=FOLDER, check=True)


def test_the_kernels_folder_is_no_package():
    """A top-level package `kernels` would shadow the one of that name that transformers imports."""
    assert not (FOLDER / "__init__.py").exists()
