"""Record the numbers anew: `python tests/golden/renew.py [--check] [CASE ...]`; no CASE is all.

With `--check` nothing is written: the largest difference of each case is printed, as a share of
what is allowed. That is how the tolerance of `values.py` was chosen.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import values
from cases import CASES, NEAR_TIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.cases) - set(CASES))
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    for case in arguments.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            got = CASES[case](Path(folder))
        if not arguments.check:
            values.write(case, got)
            print(f"{case}: written", flush=True)
            continue
        found = list(values.differences(values.read(case), got, NEAR_TIES))
        number = sum(difference.share > 1 for difference in found)
        largest = max(found, key=lambda difference: difference.share, default=None)
        told = f", the most by {largest.share:.2g} of what is allowed: {largest}" if largest else ""
        print(f"{case}: {number} moved{told}", flush=True)


if __name__ == "__main__":
    main()
