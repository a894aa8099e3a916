"""A process of tests/training/test_lifeline.py: two of them meet, and one dies as MODE says.

lifeline_worker.py MODE          # it starts the second process, or torchrun has started it
lifeline_worker.py MODE forked   # prints the pids of two that it forks, then their exit codes
"""

import os
import signal
import sys
import time

MODE = sys.argv[1]
GRACE = 2.0
"""Seconds in place of `lifeline.GRACE`: nothing here takes longer to end by itself."""


class Stopped(Exception):
    """A good end."""


def die_if(mode: str) -> None:
    if mode == MODE and os.environ.get("LOCAL_RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    die_if("second_dies_at_start")
    from mtp.training import lifeline
    from mtp.training.runtime import FabricConfig

    lifeline.GRACE = GRACE
    fabric = FabricConfig(accelerator="cpu", devices=2).build()
    with lifeline.lifeline(fabric, good=Stopped):
        sys.stdout.write("connected\n")  # in one piece
        sys.stdout.flush()
        die_if("second_dies_later")
        if MODE == "end":
            # One ends long after the other.
            time.sleep(2 * GRACE * fabric.global_rank)
            return
        time.sleep(600)


def fork() -> None:
    from forks import exit_codes, fork_ranks

    import mtp.training.runtime  # noqa: F401  # once, for both

    pids = fork_ranks(main)
    print(*pids, flush=True)
    print(*exit_codes(pids), flush=True)


if __name__ == "__main__":
    fork() if "forked" in sys.argv else main()
