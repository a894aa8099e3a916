"""The code of a head from outside the package, as an export carries it.

`from mtp.modeling.NAME import ...` in its file becomes `from .NAME import ...`, since those files
are next to it in the export. It may import nothing else of mtp and no neighbours of its own.
"""

import ast
import inspect
import re
from pathlib import Path

from ..modeling import modeling_mtp
from ..modeling.heads import HEADS

FILE = "outside_head.py"
"""Name of the head's file in an export."""
OWN = re.compile(r"^(\s*from )mtp\.modeling(\.\w+ import )", re.MULTILINE)


def outside_head(head_type: str) -> str | None:
    """The code of a `head.type` from outside the package; None for the package's own.

    Raises ValueError if an export could not carry it.
    """
    head_class = HEADS[head_type]
    if head_class.__module__.rpartition(".")[0] == modeling_mtp.__name__.rpartition(".")[0]:
        return None
    what = f"head.type={head_type}: an export carries the file that defines {head_class.__name__}"
    try:
        path = inspect.getsourcefile(head_class)
        source = Path(path or "").read_text()
    except (OSError, TypeError):
        raise ValueError(f"{what}, which cannot be read; define the class in a file") from None
    code = OWN.sub(r"\1\2", source)
    for node in ast.walk(ast.parse(code)):
        names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if not node.level else []
            if (
                node.level
                and not (Path(modeling_mtp.__file__).parent / f"{node.module}.py").exists()
            ):
                names = ["mtp"]
        if any(name.split(".")[0] == "mtp" for name in names):
            raise ValueError(
                f"{what}; it must import of mtp only `from mtp.modeling.NAME import ...`, got "
                f"{ast.unparse(node)!r} in {path}"
            )
    return code


def write_outside_head(head_type: str, folder: Path) -> None:
    """Add a head's code to an export's folder, whose modeling files are there; nothing for a head
    of the package.
    """
    code = outside_head(head_type)
    if code is None:
        return
    (folder / FILE).write_text(code)
    name = HEADS[head_type].__name__
    with (folder / Path(modeling_mtp.__file__).name).open("a") as file:
        file.write(
            "\n\n# The head of this checkpoint.\n"
            f"from .heads import register_head  # noqa: E402\n"
            f"from .{Path(FILE).stem} import {name}  # noqa: E402\n\n"
            f"register_head({head_type!r}, {name})\n"
        )
