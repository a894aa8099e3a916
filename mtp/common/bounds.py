"""Bounds of the config's numbers: declared with each field, checked before anything is built.

    lr: float = bounded(1e-3, at_least=0)

declares a field and its bounds. `check_numbers` walks over a tree of dataclasses and refuses the
first number that is out of its bounds. Modeling files ship with exports and import nothing of mtp,
so they write the metadata themselves: `field(default=5, metadata={"at_least": 1})`.

`LARGEST` limits a number whose field declares no upper bound.
"""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import field, fields, is_dataclass
from typing import Any

LARGEST = {int: 2**31 - 1, float: 1e9}
"""Largest absolute value of a number whose field declares no bound: the square of the second still
fits in float32."""
BOUNDS = ("at_least", "above", "at_most", "below")


def bounded(
    default: float | list[float] | None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that holds a number, or a list of numbers, within bounds.

    `above` and `below` leave out the bound itself. None stays allowed where it is the default.
    """
    given = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {name: bound for name, bound in given.items() if bound is not None}
    if isinstance(default, list):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_numbers(node: Any, key: str = "") -> None:
    """Raise ValueError naming the key of the first number in a tree that is out of its bounds."""
    for name, value, bounds in numbers(node, key):
        check_number(name, value, bounds)


def check_number(name: str, value: float, bounds: dict[str, float] | None) -> None:
    """Raise ValueError if a number is not finite or out of its bounds; None: it has none."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if bounds is not None:
        largest = LARGEST[type(value)]
        bounds = {"at_least": -largest, "at_most": largest} | bounds
        if "above" in bounds:
            del bounds["at_least"]
        if "below" in bounds:
            del bounds["at_most"]
        broken = next((b for b, limit in bounds.items() if not _holds(b, value, limit)), None)
        if broken is not None:
            word = broken.replace("_", " ")
            raise ValueError(f"{name} must be {word} {bounds[broken]:.10g}, got {value}")


def _holds(bound: str, value: float, limit: float) -> bool:
    if bound == "at_least":
        return value >= limit
    if bound == "above":
        return value > limit
    return value <= limit if bound == "at_most" else value < limit


def numbers(
    node: Any, key: str = "", bounds: dict[str, float] | None = None
) -> Iterator[tuple[str, float, dict[str, float] | None]]:
    """(key, value, bounds) of every number below a node; the numbers of a list share its bounds.

    Bounds are None where no field declares any: in a mapping that is passed to another library.
    """
    if isinstance(node, int | float) and not isinstance(node, bool):
        yield key, node, bounds
    elif is_dataclass(node):
        for entry in fields(node):
            declared = {b: entry.metadata[b] for b in BOUNDS if b in entry.metadata}
            yield from numbers(getattr(node, entry.name), join(key, entry.name), declared)
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from numbers(value, join(key, str(name)))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from numbers(value, f"{key}[{index}]", bounds)


def join(key: str, name: str) -> str:
    """The key of an entry."""
    return f"{key}.{name}" if key else name
