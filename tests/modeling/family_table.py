"""The families of docs/models.md: what the contract says of each, and a command that writes it.

    python tests/modeling/family_table.py --write                all families (minutes)
    python tests/modeling/family_table.py --write gemma2 mamba   these only; the others stay

Every family is examined as in `test_families.py`, and the page is written after each, so an
interrupted run continues with the families that are named to the next one.
"""

import argparse
import re
import sys
import time
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from families import FAMILIES
from family_contract import Verdict, verdict

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
STATUSES = {
    "yes": "with a cache",
    "slower": "slower: without a cache, each pass reads the whole text",
    "refused": "refused",
}
"""`Verdict.status` -> what the page says."""


def read_rows() -> dict[str, tuple[str, str]]:
    """`model_type` -> (status, reason) of each row of the page."""
    block = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    rows = re.findall(r"^\| (?:\*\*)?([^|]+?)(?:\*\*)? \| ([^|]+) \|$", block, re.MULTILINE)
    found: dict[str, tuple[str, str]] = {}
    for what, content in rows:
        for status, title in STATUSES.items():
            if status != "refused" and what == title:
                found |= {name: (status, "") for name in re.findall(r"`([^`]+)`", content)}
        if what.startswith("`"):
            found[what.strip("`")] = ("refused", content)
    return found


def read_table() -> dict[str, str]:
    """`model_type` -> status, as the page says, in alphabetical order."""
    return {name: status for name, (status, _) in sorted(read_rows().items())}


def write_rows(rows: dict[str, tuple[str, str]]) -> None:
    """Write the page's table of families."""
    lines = ["", "| families | `model_type` |", "|---|---|"]
    for status, title in STATUSES.items():
        names = sorted(name for name, (found, _) in rows.items() if found == status)
        if status != "refused":
            lines.append(f"| {title} | {', '.join(f'`{name}`' for name in names)} |")
    refused = sorted((name, reason) for name, (found, reason) in rows.items() if found == "refused")
    if refused:
        lines += ["", "| refused | reason |", "|---|---|"]
        lines += [f"| `{name}` | {reason} |" for name, reason in refused]
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n\n" + END + after)


def row(found: Verdict) -> tuple[str, str]:
    """A verdict as the page has it."""
    return found.status, found.reason.replace("|", "/")


def main() -> None:
    """Examine families and print, or write, what holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model types; default: all")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    options = parser.parse_args()
    unknown = sorted(set(options.families) - set(FAMILIES))
    if unknown:
        parser.error(f"FAMILY must be one of tests/modeling/families.py, got {', '.join(unknown)}")
    names = options.families or list(FAMILIES)
    failed = []
    for number, name in enumerate(names, 1):
        began = time.perf_counter()
        try:
            found = verdict(name)
        except Exception:  # any failure of a family that was taken is one of the contract
            failed.append(name)
            traceback.print_exc()
            continue
        seconds = time.perf_counter() - began
        print(f"[{number}/{len(names)}] {name}: {found.status} {found.reason} ({seconds:.0f} s)")
        if options.write:
            kept = {n: r for n, r in read_rows().items() if n in FAMILIES}
            write_rows(kept | {name: row(found)})
    if failed:
        sys.exit(f"{', '.join(failed)}: taken, but not as the contract says")


if __name__ == "__main__":
    main()
