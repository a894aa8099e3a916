"""Processor time until help is shown, beside that of importing what a run needs.

    python benchmarks/startup.py [--rounds 3] [--json]

Commands take turns, and medians of user and system time are printed. Targets: `mtp --help` takes
at most 0.1 s, and `python train.py --help` at most the time of the three imports.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "mtp --help": [str(Path(sys.executable).with_name("mtp")), "--help"],
    "train.py --help": [sys.executable, "train.py", "--help"],
    "imports": [sys.executable, "-c", "import torch, transformers, lightning"],
}


def seconds(command: list[str]) -> float:
    """User and system time of a command and its children."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return spent() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(arguments.rounds):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["train.py --help"] / medians["imports"]
    if arguments.json:
        print(json.dumps({"seconds": medians, "train_help_over_imports": ratio}))
        return
    for name, value in medians.items():
        print(f"{name:<16} {value:6.2f} s of processor time")
    print(f"train.py --help takes {ratio:.2f} times the imports of torch, transformers, lightning")


if __name__ == "__main__":
    main()
