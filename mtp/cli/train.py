"""`mtp train`, which is also `train.py`: a run, or a sweep, from the settings of conf/.

The folder `mtp/conf` is part of the installed package; in a checkout it is a link to conf/.
"""

import os
import sys

from ..common.conf import CONF
from ..common.process import run_command
from .completion import choices_of_group
from .help import help_text


def train(arguments: list[str], program: str) -> int:
    """Train with Hydra's arguments, or print the help; returns the exit code.

    program: the words of the command line before its arguments, for the help.
    """
    if {"-h", "--help"} & set(arguments):
        return run_command(lambda: print(help_text(CONF, program)))
    choices = choices_of_group(arguments, CONF)
    if choices is not None:
        return run_command(lambda: print(choices))
    # A step's freed memory returns to the system and is fetched page by page in the next step.
    # PyTorch reads this at its first allocation: blocks of 2 MB and more use large pages (Linux).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Hydra raises, and `run_command` chooses the message.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    from .hydra import compose_and_run

    return run_command(lambda: compose_and_run(arguments, CONF))


def main() -> int:
    """`train.py`."""
    return train(sys.argv[1:], "python train.py")
