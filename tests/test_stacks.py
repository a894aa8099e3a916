"""One place for each version: bounds, constraints, the card and `mtp doctor` agree."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from mtp.cli.doctor import NEWEST_TESTED
from mtp.hub.model_card import OLDEST_TRANSFORMERS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(path: Path) -> dict[str, Version]:
    """Package -> version in a file of constraints."""
    found = re.findall(r"^([\w-]+)==(\S+)", path.read_text(), re.MULTILINE)
    return {name: Version(version) for name, version in found}


def test_the_oldest_stack_is_the_lower_bounds():
    pins = pinned(ROOT / ".ci/stacks/oldest.txt")
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]:
        needed = Requirement(text)
        (bound,) = [one.version for one in needed.specifier if one.operator == ">="]
        assert pins[needed.name].release[:2] == (*Version(bound).release, 0)[:2], needed.name
        assert needed.specifier.contains(pins[needed.name]), needed.name


def test_the_card_asks_for_the_lower_bound_of_transformers():
    assert f"transformers>={OLDEST_TRANSFORMERS},<6" in PROJECT["dependencies"]


def test_doctor_knows_the_newest_versions_that_the_tests_run_with():
    pins = pinned(ROOT / "constraints.txt")
    shown = {name: ".".join(map(str, pins[name].release[:2])) for name in NEWEST_TESTED}
    assert shown == NEWEST_TESTED
