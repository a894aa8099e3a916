"""The end of a command: its exit code, one line for a user's mistake, quiet for Ctrl-C and pipes.

    0    done
    1    the reader of standard output has gone, as in `mtp generate ... | head -1`
    2    a mistake: one line, `error: ...`, on standard error
    130  Ctrl-C; a run that another signal has stopped ends with 128 + signal

Unexpected errors keep their traceback; MTP_TRACEBACK=1 shows that of a mistake too. This module
imports nothing heavy, so Ctrl-C is quiet from the first line of a command.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


def print_error(line: str) -> None:
    """Write an error line at once and in one piece, since several processes write to one stream."""
    sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handler for Ctrl-C when there is nothing to clean up."""
    os._exit(130)


def quiet_imports() -> None:
    """Let Ctrl-C end the process at once, except in commands that `run_command` runs.

    Libraries turn a KeyboardInterrupt during their imports into other errors.
    """
    signal.signal(signal.SIGINT, end_at_once)


def run_command(command: Callable[[], Any]) -> int:
    """Run a command and return its exit code, see the module. A code that the command returns is
    kept.
    """
    fill_closed_streams()
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, interrupt) if is_main else None
    try:
        code = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        silence_stdout()
        return 1
    except Exception as error:
        if interrupted:
            return 130
        from .errors import one_line

        line = one_line(error)
        if line is None or os.environ.get("MTP_TRACEBACK"):
            raise
        if isinstance(error, OSError):
            silence_stdout()  # if it could not be written, the last flush fails as well
        print_error(line)
        return 2
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
    return code if isinstance(code, int) and not isinstance(code, bool) else 0


def fill_closed_streams() -> None:
    """Open the null device in place of standard streams that the caller has closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def silence_stdout() -> None:
    """Redirect standard output to the null device, so that the last flush cannot fail."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # not a file, as in a test that captures it
        return
