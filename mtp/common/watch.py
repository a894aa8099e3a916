"""A process that ends with another one, whether or not it is its parent. Imports nothing heavy."""

import os
import select
import signal
import threading
import time
from contextlib import suppress

from .lock import is_alive
from .process import print_error

GRACE = 10.0
"""Seconds in which a job whose launcher has ended may finish its step and save a checkpoint."""

_watched: set[int] = set()


def end_with(process: int, line: str) -> None:
    """Once another process of this machine has ended, print a line and end this process.

    It gets SIGTERM, by which a run saves a checkpoint after its step, and is ended after `GRACE`.
    """

    def watch() -> None:
        wait_for_end(process)
        with suppress(OSError):  # the reader of its output has often ended, too
            print_error(line)
        # The system's alarm ends the process, since a thread stops when Python begins to exit.
        signal.setitimer(signal.ITIMER_REAL, GRACE)
        os.kill(os.getpid(), signal.SIGTERM)

    if process == os.getpid() or process in _watched:
        return
    _watched.add(process)
    threading.Thread(target=watch, daemon=True).start()


def wait_for_end(process: int) -> None:
    """Block until a process has ended, even if its parent has not noticed."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # not on this system
        _poll(process)
        return
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    waiting.poll()
    os.close(descriptor)


def _poll(process: int) -> None:
    while is_alive(process):
        time.sleep(0.5)
