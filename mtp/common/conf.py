"""The folder conf/ of an installed or checked-out mtp, and the options of its groups.

Imports nothing that a run needs, since help and completion read it.
"""

from pathlib import Path

CONF = Path(__file__).parents[1] / "conf"
"""Default settings, choices and experiments."""


def options_of(group: Path) -> list[str]:
    """Names of the options in a group's folder, those in folders of their own last."""
    files = sorted(group.rglob("*.yaml"), key=lambda path: (path.parent != group, path))
    return [path.relative_to(group).with_suffix("").as_posix() for path in files]
