"""Processes of a run that are forked from one, so that they share the seconds of its imports."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def fork_ranks(work: Callable[..., Any], *given: Any, number: int = 2) -> list[int]:
    """Pids of processes that call `work`, with the environment that torchrun gives them."""
    port, pids = free_port(), []
    for rank in range(number):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_PORT": port}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            code = 1
            try:
                work(*given)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    return pids


def exit_codes(pids: list[int]) -> list[int]:
    """Waits for the processes; a negative code is the signal that has ended one."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
