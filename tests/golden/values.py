"""Recorded numbers: where they are, and which of them moved."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("values")

RELATIVE, ABSOLUTE = 1e-3, 3e-5
"""A number may differ by RELATIVE of itself plus ABSOLUTE.

Chosen by `renew.py --check` while rounding was disturbed: initial weights multiplied by 1 + 6e-8
times normal noise, plain SSE or AVX2 in place of AVX-512 (`ATEN_CPU_CAPABILITY`,
`ONEDNN_MAX_CPU_ISA`, `MKL_ENABLE_INSTRUCTIONS`), two threads in place of one. No sampled token
changed. The largest effect was a third of what is allowed here, most were a hundredth. Updates
amplify rounding a thousandfold, and Muon, which raises small singular values, even more. Hence few
steps, low rates, and AdamW where the rate has to be high.
"""

DIGITS = 6
"""Significant digits of a recorded number."""
NOTHING = 1e-6
"""Less than this is recorded as 0: what is left by rounding has no digits of its own."""


@dataclass(frozen=True)
class Moved:
    """A value that is not what was recorded."""

    place: str
    """Section, name and index."""
    expected: Any
    got: Any
    slack: float = 0.0
    """Added to what is allowed."""

    @property
    def share(self) -> float:
        """The difference over what is allowed; infinite for what is compared exactly."""
        if not (is_number(self.expected) and is_number(self.got)):
            return math.inf
        if isinstance(self.expected, int) and isinstance(self.got, int):
            return math.inf
        allowed = ABSOLUTE + self.slack + RELATIVE * abs(self.expected)
        share = abs(self.got - self.expected) / allowed
        return math.inf if math.isnan(share) else share

    def __str__(self) -> str:
        if not (is_number(self.expected) and is_number(self.got)):
            return f"{self.place}: expected {self.expected!r}, got {self.got!r}"
        off = self.got - self.expected
        relative = f" ({off / abs(self.expected):+.2%})" if self.expected else ""
        numbers = f"expected {self.expected:.{DIGITS}g}, got {self.got:.{DIGITS + 1}g}"
        return f"{self.place}: {numbers}, off by {off:+.3g}{relative}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


MISSING = "nothing of that name"


def differences(
    expected: Any, got: Any, slacks: dict[str, float], place: str = ""
) -> Iterator[Moved]:
    """Every recorded value that is not the very same, in the order in which it was recorded.

    Values that were not recorded are left aside: a new metric moves nothing. `slacks`: by a part of
    a name.
    """
    if isinstance(expected, dict) and isinstance(got, dict):
        for name, value in expected.items():
            here = f"{place}, {name}" if place else name
            yield from differences(value, got.get(name, MISSING), slacks, here)
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for index, (value, other) in enumerate(zip(expected, got, strict=True)):
            yield from differences(value, other, slacks, f"{place}[{index}]")
    elif expected != got:
        slack = sum(slack for part, slack in slacks.items() if part in place)
        yield Moved(place, expected, got, slack)


def moved(expected: Any, got: Any, slacks: dict[str, float]) -> list[Moved]:
    """The differences that are larger than allowed."""
    return [difference for difference in differences(expected, got, slacks) if difference.share > 1]


def report(case: str, found: list[Moved], most: int = 12) -> str:
    """The values that moved, in order: later numbers follow from earlier ones."""
    lines = [f"{case}: {len(found)} recorded values moved, in the order of the run:"]
    lines += [f"  {one}" for one in found[:most]]
    if len(found) > most:
        lines.append(f"  ... and {len(found) - most} more")
    lines.append(f"If they were meant to move: python tests/golden/renew.py {case}")
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}") if abs(value) >= NOTHING else 0.0
    return value


def read(case: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{case}.json").read_text())


def write(case: str, values: dict[str, dict[str, Any]]) -> None:
    """One value a line, so that a diff shows what moved."""
    sections = []
    for section, numbers in rounded(values).items():
        lines = [f"  {json.dumps(name)}: {json.dumps(v)}" for name, v in numbers.items()]
        sections.append(f" {json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n }")
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{case}.json").write_text("{\n" + ",\n".join(sections) + "\n}\n")
