"""A process of tests/training/test_lifeline.py: two of them meet, and one dies as MODE says."""

import os
import signal
import sys
import time

MODE, RANK = sys.argv[1], os.environ.get("LOCAL_RANK", "0")


class Stopped(Exception):
    """A good end."""


def die_if(mode: str) -> None:
    if mode == MODE and RANK == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    die_if("second_dies_at_start")
    from mtp.training.lifeline import lifeline
    from mtp.training.runtime import FabricConfig

    fabric = FabricConfig(accelerator="cpu", devices=2).build()
    with lifeline(fabric, good=Stopped):
        sys.stdout.write("connected\n")  # in one piece
        sys.stdout.flush()
        die_if("second_dies_later")
        if MODE == "end":
            # One ends long after the other.
            time.sleep(8 * fabric.global_rank)
            return
        time.sleep(600)


if __name__ == "__main__":
    main()
