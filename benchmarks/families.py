"""Try the contract of every family of causal LMs that transformers knows, on tiny random models.

    python benchmarks/families.py                  all families, one line each
    python benchmarks/families.py gemma2 mistral   some
    python benchmarks/families.py --write          all, and write the table in docs/models.md

The checks are those of tests/family_checks.py. Results are kept in a file (`--cache`), so that a
stopped run continues.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def tried(family: str, num_new: int) -> dict[str, str]:
    """State of a family and, if it is not supported with a cache, the reason."""
    from family_checks import check_family

    try:
        model = check_family(family, num_new)
    except ValueError as error:
        return {"state": "refused", "reason": " ".join(str(error).split())}
    except Exception as error:
        text = " ".join(str(error).split())
        return {"state": "failed", "reason": f"{type(error).__name__}: {text[:200]}"}
    if model.mtp_rereads is None:
        return {"state": "supported", "reason": ""}
    return {"state": "slower loop", "reason": model.mtp_rereads}


def table(found: dict[str, dict[str, str]], num_new: int) -> str:
    """Markdown of the results."""
    import transformers

    counts: dict[str, int] = {}
    for result in found.values():
        counts[result["state"]] = counts.get(result["state"], 0) + 1
    lines = [
        f"With transformers {transformers.__version__} and {num_new} new tokens per text: "
        + ", ".join(f"{number} {state}" for state, number in sorted(counts.items())) + ".",
        "",
    ]  # fmt: skip
    with_cache = sorted(name for name, r in found.items() if r["state"] == "supported")
    lines += ["**Supported**: " + ", ".join(f"`{name}`" for name in with_cache) + ".", ""]
    for state, title in (("slower loop", "Slower loop"), ("refused", "Refused")):
        rows = sorted((r["reason"], name) for name, r in found.items() if r["state"] == state)
        by_reason: dict[str, list[str]] = {}
        for reason, name in rows:
            by_reason.setdefault(short(reason), []).append(name)
        lines += [f"| {title} | reason |", "|---|---|"]
        lines += [f"| {', '.join(names)} | {reason} |" for reason, names in by_reason.items()]
        lines += [""]
    return "\n".join(lines)


def short(reason: str) -> str:
    """A refusal without the name of its class and its remedy."""
    words = reason.split("; choose")[0].split()
    return " ".join("it" if "MTP" in word else word for word in words)


def main() -> None:
    from families import REFUSED, SUPPORTED

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="`model_type`s; default: all")
    parser.add_argument("--new", type=int, default=60, help="new tokens per text")
    parser.add_argument("--write", action="store_true", help="write the table in docs/models.md")
    parser.add_argument("--cache", type=Path, help="JSON file of results so far")
    given = parser.parse_args()
    if given.write and given.families:
        parser.error("--write needs all families; leave their names out")
    from transformers import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    if given.cache is not None and given.cache.is_file():
        found = json.loads(given.cache.read_text())
    names = given.families or [*SUPPORTED, *REFUSED]
    for index, name in enumerate(names):
        if name not in found:
            found[name] = tried(name, given.new)
            if given.cache is not None:
                given.cache.write_text(json.dumps(found, indent=1))
        result = found[name]
        print(
            f"[{index + 1}/{len(names)}] {name:22} {result['state']} {result['reason']}", flush=True
        )
    failed = [name for name in names if found[name]["state"] == "failed"]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    if given.write:
        page = ROOT / "docs" / "models.md"
        before, rest = page.read_text().split(BEGIN)
        after = rest.split(END)[1]
        page.write_text(
            f"{before}{BEGIN}\n{table({n: found[n] for n in names}, given.new)}{END}{after}"
        )


if __name__ == "__main__":
    main()
