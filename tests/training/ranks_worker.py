"""One of the processes of tests/training/test_ranks.py: takes the cases' steps and saves them.

    ranks_worker.py FOLDER STRATEGY CASE ...

Processes learn of each other by LOCAL_RANK and so on, as those that torchrun starts.
"""

import sys
from pathlib import Path

import torch
from rank_cases import CASES, take_step

from mtp.training.runtime import FabricConfig


def main() -> None:
    folder, strategy, *names = sys.argv[1:]
    torch.set_num_threads(1)
    fabric = FabricConfig(accelerator="cpu", devices=2, strategy=strategy).build()
    for name in names:
        result = take_step(CASES[name], fabric)
        if fabric.is_global_zero:
            torch.save(result, Path(folder) / f"{name}.pt")


if __name__ == "__main__":
    main()
