"""Two processes for tests/training/test_ranks.py, which take the cases' steps and save them.

    ranks_worker.py FOLDER '{"ddp": ["k1", ...], ...}'

Processes learn of each other by LOCAL_RANK and so on, as those that torchrun starts. Those of the
next strategy begin when those of the one before have ended.
"""

import json
import sys
from pathlib import Path

import torch
from forks import exit_codes, fork_ranks
from rank_cases import CASES, take_step

from mtp.training.runtime import FabricConfig


def take_steps(folder: Path, strategy: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    fabric = FabricConfig(accelerator="cpu", devices=2, strategy=strategy).build()
    for name in names:
        result = take_step(CASES[name], fabric)
        if fabric.is_global_zero:
            torch.save(result, folder / f"{strategy} {name}.pt")


def main() -> int:
    folder, cases = sys.argv[1:]
    for strategy, names in json.loads(cases).items():
        if exit_codes(fork_ranks(take_steps, Path(folder), strategy, names)) != [0, 0]:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
