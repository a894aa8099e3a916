"""Equality of mathematical answers, by math-verify in a separate process with a time limit.

A policy may answer `9**9**9`, whose evaluation does not end and cannot be interrupted within a
process: computing big integers does not check signals. So each comparison runs under an alarm that
ends the worker, which is then restarted; an answer that takes too long is wrong.

Run as a script, this file is the worker: it reads a JSON list [gold, answer, seconds] per line and
writes `true`, `false` or `null` (the gold answer cannot be read) per line.
"""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import weakref
from contextlib import suppress

_START = "ready"


class MathVerifier:
    """Compares answers; starts its worker at the first call."""

    def __init__(self, seconds: int = 5):
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "task.reward=math needs the package math-verify, which is not installed; run "
                "`pip install math-verify`"
            )
        self.seconds = seconds
        """Time limit of one comparison in seconds."""
        self._worker: subprocess.Popen[str] | None = None

    def __call__(self, gold: str, answer: str) -> float:
        """1.0 if the answer equals the gold one, else 0.0; LaTeX needs no dollar signs.

        Raises ValueError if the gold answer is no mathematics, RuntimeError if the worker fails.
        """
        request = json.dumps([gold, answer, self.seconds]) + "\n"
        for _ in range(2):  # once more, should the worker have died
            reply, status = self._ask(request)
            if reply:
                break
            if status == -signal.SIGALRM:
                return 0.0
        else:
            raise RuntimeError(f"the math-verify worker ended with status {status}")
        equal = json.loads(reply)
        if equal is None:
            raise ValueError(
                f"the gold answer must be a mathematical expression for task.reward=math, got "
                f"{gold!r}; correct the row or choose task.reward=exact"
            )
        return float(equal)

    def _ask(self, request: str) -> tuple[str, int]:
        """The worker's reply; empty if it has ended, then with its status."""
        if self._worker is None:
            self._worker = self._start()
        worker = self._worker
        assert worker.stdin is not None and worker.stdout is not None
        with suppress(BrokenPipeError):
            worker.stdin.write(request)
            worker.stdin.flush()
            if reply := worker.stdout.readline():
                return reply, 0
        self._worker = None
        status = worker.wait()
        _close(worker)
        return "", status

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps this file's folder off the worker's path, where it would shadow packages
        worker = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the run, which ends with a checkpoint
        )
        weakref.finalize(self, _close, worker)
        assert worker.stdout is not None
        if worker.stdout.readline().strip() != _START:
            raise RuntimeError(
                "the math-verify worker did not start; try `python -c 'import math_verify'`"
            )
        return worker


def _close(worker: subprocess.Popen[str]) -> None:
    """End a worker and free its pipes; harmless the second time."""
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


_NUMBER = re.compile(r"\$?\s*(?:\\boxed\{)?\s*[-+−]?\$?[\d.,]+\s*%?\s*\}?\s*\$?")
_POWER = re.compile(r"\*\*|(?:\\times|\\cdot|[*×·])\s*10\s*\^")
"""Powers, and the power of ten of a number such as `1.2 * 10^5`."""
_COMPUTES = re.compile(
    r"(?<=[\d)}])\s*(?:[+*×·÷]|-\s*(?=[\d({\\]))|\\(?:times|cdot|div|sum|prod|int|binom|lim)(?![a-z])"
)


def _only_asks(gold: str, answer: str) -> bool:
    """True for a gold answer that is a number, and an answer that still has to be computed.

    `37+85` asks for 122 as a question does. A fraction, a root, a power or `1.2 * 10^5` is a way to
    write a number, and `37+85=122` ends with one.
    """
    last = re.split(r"=(?![^{]*\})", answer)[-1]  # not that of `\sum_{i=1}`
    return bool(_NUMBER.fullmatch(gold.strip()) and _COMPUTES.search(_POWER.sub("^", last)))


def _equal(gold: str, answer: str) -> bool | None:
    from math_verify import parse, verify

    def read(text: str, *, latex: bool) -> list:
        marked = "$" in text or "\\boxed" in text
        return parse(f"${text}$" if latex and not marked else text, parsing_timeout=None)

    wanted = read(gold, latex=True) or read(gold, latex=False)
    if not wanted:
        return None
    if _only_asks(gold, answer):
        return False
    return any(
        verify(wanted, read(answer, latex=latex), timeout_seconds=None) for latex in (False, True)
    )


def _serve() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        # A cluster sends them to every process; this one ends when its input does.
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    import math_verify  # noqa: F401  before the clock runs

    print(_START, flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        signal.alarm(seconds)
        equal = _equal(gold, answer)
        signal.alarm(0)
        print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    _serve()
