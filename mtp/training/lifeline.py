"""A process of a run that dies ends the others, each with one line, within seconds.

Without it the others wait in a collective until that times out, half an hour by default.

* From the start: a process that started the others watches them, and they watch it. torchrun and
  `srun --kill-on-bad-exit` watch the processes that they start, and those watch torchrun.
* Once all have met: every process holds a connection to the first. It closes when a process ends,
  however that happens. One that ends well says so before.
"""

import os
import secrets
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning.fabric import Fabric

from ..common.process import print_error
from ..common.watch import end_with

PARENT = "MTP_PARENT_PROCESS"
"""Environment variable: the process that started this one as one of its run."""
GRACE = 5.0
"""Seconds that a process has to end by itself, with an error of its own, after another has."""
CONNECT = 60.0
"""Seconds in which processes that have met must connect."""
BYE = b"bye\n"


def end(line: str) -> NoReturn:
    """End this process at once, whatever it waits for, with one line."""
    print_error(line)
    os._exit(1)


def watch_start(fabric: Fabric) -> None:
    """Watch the processes that Fabric is about to start, or the one that has started this."""
    launcher: Any = fabric.strategy.launcher
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid(), "torchrun, which started this process, has ended")
    parent = os.environ.get(PARENT)
    if parent == str(os.getpid()):
        parent = None
    if parent is not None and os.getppid() != int(parent):
        end("the first process of the run has ended; its own output says why")
    if parent is not None:
        threading.Thread(target=_watch_parent, args=(int(parent),), daemon=True).start()
    elif hasattr(launcher, "procs") and not _started_by_others(fabric):
        os.environ[PARENT] = str(os.getpid())
        threading.Thread(target=_watch_children, args=(launcher,), daemon=True).start()


def _started_by_others(fabric: Fabric) -> bool:
    environment: Any = getattr(fabric.strategy, "cluster_environment", None)
    return environment is None or environment.creates_processes_externally


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(GRACE)
    end("the first process of the run has ended; its own output says why")


def _watch_children(launcher: Any) -> None:
    """Takes over from Fabric's observer, which ends all processes without a word."""
    while len(launcher.procs) + 1 < launcher.num_processes:
        time.sleep(0.2)
    children: list[subprocess.Popen[bytes]] = list(launcher.procs)
    launcher.procs.clear()
    while True:
        codes = [child.poll() for child in children]
        failed = next((i for i, code in enumerate(codes) if code), None)
        if failed is not None:
            time.sleep(GRACE)
            for child in children:
                if child.poll() is None:
                    child.kill()
            end(
                f"process {failed + 1} of the run has ended with code {codes[failed]}; its own "
                "output says why"
            )
        if all(code == 0 for code in codes):
            return
        time.sleep(0.2)


class Lifeline:
    """Connections between the first process and all others."""

    def __init__(self, fabric: Fabric):
        """All processes make one together."""
        self.rank, self.is_over = fabric.global_rank, threading.Event()
        self.death = threading.Event()
        self.peers: dict[socket.socket, int] = {}
        environment: Any = fabric.strategy.cluster_environment  # type: ignore[attr-defined]
        if self.rank == 0:
            with socket.create_server(("", 0)) as server:
                token = secrets.token_bytes(16)
                fabric.broadcast((server.getsockname()[1], token))
                self._accept(server, token, fabric.world_size - 1)
        else:
            port, token = fabric.broadcast((0, b""))
            address = environment.main_address, port
            peer = socket.create_connection(address, timeout=CONNECT)
            peer.sendall(token + self.rank.to_bytes(4, "big"))
            self._add(peer, 0)
        threading.Thread(target=self._watch, daemon=True).start()

    def _accept(self, server: socket.socket, token: bytes, number: int) -> None:
        deadline = time.monotonic() + CONNECT
        while len(self.peers) < number:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                peer, _ = server.accept()
                peer.settimeout(CONNECT)
                said = peer.recv(20, socket.MSG_WAITALL)
            except TimeoutError:
                end("not all processes of the run have connected to the first within a minute")
            if said[:16] == token:
                self._add(peer, int.from_bytes(said[16:], "big"))
            else:
                peer.close()

    def _add(self, peer: socket.socket, rank: int) -> None:
        peer.settimeout(None)
        # A machine that is gone closes nothing.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        self.peers[peer] = rank

    def _watch(self) -> None:
        """Wait for a peer that ends without a word."""
        with selectors.DefaultSelector() as selector:
            for peer, rank in self.peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    connection: Any = key.fileobj
                    try:
                        said = connection.recv(64)
                    except OSError:
                        said = b""
                    selector.unregister(connection)
                    if said != BYE and not self.is_over.is_set():
                        self._end(said, key.data)

    def _end(self, said: bytes, rank: int) -> None:
        self.death.set()
        dead = int(said) if said.strip().isdigit() else rank
        if self.rank == 0:
            for peer in self.peers:
                try:
                    peer.sendall(b"%d\n" % dead)
                except OSError:
                    continue
        time.sleep(GRACE)
        if not self.is_over.is_set():
            end(f"process {dead} of the run has ended; its own output says why")

    def close(self) -> None:
        """End well: the others do not mind that this process ends."""
        self.is_over.set()
        for peer in self.peers:
            try:
                peer.sendall(BYE)
            except OSError:
                continue


@contextmanager
def lifeline(fabric: Fabric, good: type[Exception]) -> Iterator[None]:
    """Inside, a process that dies ends this one. To leave without an error, or by `good`, is to end
    well.
    """
    if fabric.world_size == 1:
        yield
        return
    line = Lifeline(fabric)
    try:
        yield
    except RuntimeError:
        # A collective fails when another process has died, and the line says which.
        if line.death.wait(GRACE):
            time.sleep(3 * GRACE)
        raise
    except good:
        line.close()
        raise
    line.close()
