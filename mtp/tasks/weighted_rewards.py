"""Reward functions of a run: called together, limited in time, and added with their weights.

The score of an answer is the sum of weight times value over the functions that apply to its row, as
in TRL: a function that returns None for a row is left out there. An answer to which none applies
has no score, which is an error.

A reward runs under a time limit: code that a policy's answer sends into an endless loop must not
stop a run. An answer that takes too long is worth 0, with one warning. The limit interrupts Python
code; it cannot interrupt a C function that never checks signals, such as a power of huge integers.

All `async def` calls of a batch of answers are awaited together, in one event loop that lives as
long as the rewards do. Calls that do not end there in time are repeated one by one, each with the
whole limit, so that a value never depends on what else was in the batch.
"""

import asyncio
import hashlib
import inspect
import logging
import math
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

from .base import Attempt, Example, RewardError, RunState, Scored, Task, fingerprint
from .reward_functions import Call, RewardFunction

_log = logging.getLogger(__name__)


class TookTooLong(BaseException):
    """Raised within a reward at its time limit; no `except Exception` of its own stops it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` in the body after this many seconds.

    Raises RuntimeError outside the main thread, where Python delivers no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a reward's time limit needs the main thread, which signals reach")

    def ring(number: int, frame: FrameType | None) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, ring)
    began = time.monotonic()
    # Another alarm may be set, see `common.watch.end_with`: it rings later in place of being lost.
    rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if rest:
            left = rest - (time.monotonic() - began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3))


class EventLoop:
    """An event loop that lives as long as this object."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self.close = weakref.finalize(self, self._runner.close)
        """Ends the loop and what is left in it."""

    def run(self, awaitables: Sequence[Any], seconds: float) -> list[Any]:
        """Results of awaitables, in order; an exception in place of the result of one that raised.

        `TookTooLong` in place of one that had not ended after this many seconds. Raises it if the
        loop itself was blocked for longer.
        """

        async def limited(awaitable: Any) -> Any:
            limit = asyncio.timeout(seconds)
            try:
                async with limit:
                    return await awaitable
            except TimeoutError:
                if limit.expired():
                    return TookTooLong()
                raise
            except SystemExit as error:  # which would end the loop, and no call would be named
                return error

        async def together() -> list[Any]:
            waiting = [limited(awaitable) for awaitable in awaitables]
            return await asyncio.gather(*waiting, return_exceptions=True)

        with time_limit(2 * seconds):
            return self._runner.run(together())


class WeightedRewards:
    """Reward functions with their weights."""

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] = (),
        seconds: float = 10.0,
        state: Callable[[], RunState] = RunState,
    ):
        """Raises ValueError naming the key of an impossible value.

        Args:
            functions: functions of different names.
            weights: a weight for each; empty: 1 for each.
            seconds: time limit of a function per answer.
            state: returns the run's position.
        """
        names = [function.name for function in functions]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"task.reward must name different functions, got {names}")
        if weights and len(weights) != len(functions):
            raise ValueError(
                f"task.reward_weights must have one weight for each of the {len(functions)} "
                f"functions of task.reward, got {len(weights)}"
            )
        if seconds <= 0:
            raise ValueError(f"task.reward_seconds must be above 0, got {seconds}")
        self.functions = list(functions)
        self.weights = list(weights) or [1.0] * len(functions)
        self.seconds, self.state = seconds, state
        self._loop: EventLoop | None = None
        self._warned: set[str] = set()

    def __call__(self, attempts: Sequence[Attempt]) -> list[Scored]:
        """Score attempts. Raises RewardError for one that cannot be scored."""
        state = self.state()
        calls = [[Call(attempt, state) for _ in self.functions] for attempt in attempts]
        values: dict[tuple[int, int], float | None] = {}
        pending: dict[tuple[int, int], Any] = {}
        try:
            for row, of_attempt in enumerate(calls):
                for number, call in enumerate(of_attempt):
                    result = self._started(number, call)
                    if inspect.isawaitable(result):
                        pending[row, number] = result
                    else:
                        values[row, number] = self._read(number, call, result)
            values |= self._awaited(calls, pending)
        finally:
            for result in pending.values():
                if inspect.iscoroutine(result):
                    result.close()  # one that ended ignores it
        return [
            self._scored(of_attempt, [values[row, n] for n in range(len(self.functions))])
            for row, of_attempt in enumerate(calls)
        ]

    def _started(self, number: int, call: Call) -> Any:
        """Result of a function, which is awaitable for an `async def`; `TookTooLong` if late."""
        function = self.functions[number]
        try:
            with time_limit(self.seconds) if function.is_limited else nullcontext():
                return function.start(call)
        except TookTooLong as late:
            return late
        # A reward that ends the process or cancels its task must not end the run silently.
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            raise RewardError(call.attempt, error) from error

    def _awaited(
        self, calls: list[list[Call]], pending: dict[tuple[int, int], Any]
    ) -> dict[tuple[int, int], float | None]:
        """Values of the calls that are awaited; `calls` gets new ones for those made again."""
        if not pending:
            return {}
        try:
            results = self._wait(list(pending.values()))
        except TookTooLong as late:
            results = [late] * len(pending)
        values = {}
        for (row, number), result in zip(list(pending), results, strict=True):
            if isinstance(result, TookTooLong) and len(pending) > 1:
                calls[row][number] = Call(calls[row][number].attempt, calls[row][number].state)
                result = self._started(number, calls[row][number])
                if inspect.isawaitable(result):
                    try:
                        (result,) = self._wait([result])
                    except TookTooLong as late:
                        result = late
            values[row, number] = self._read(number, calls[row][number], result)
        return values

    def _wait(self, awaitables: list[Any]) -> list[Any]:
        if self._loop is None:
            self._loop = EventLoop()
        try:
            return self._loop.run(awaitables, self.seconds)
        except TookTooLong:
            # What is left in the loop must not continue in the next one.
            self._loop.close()
            self._loop = None
            raise

    def _read(self, number: int, call: Call, result: Any) -> float | None:
        """The value within a function's result: 0 for a call that took too long."""
        function = self.functions[number]
        if isinstance(result, TookTooLong):
            if function.name not in self._warned:
                _log.warning(
                    "%s took over task.reward_seconds=%g for the answer %r, which is worth 0; "
                    "further ones are not reported",
                    function.name,
                    self.seconds,
                    call.attempt.answer[:80],
                )
            self._warned.add(function.name)
            return 0.0
        if isinstance(result, BaseException):
            raise RewardError(call.attempt, result) from result
        try:
            return function.read(result)
        except (TypeError, ValueError) as error:
            raise RewardError(call.attempt, error) from error

    def _scored(self, calls: list[Call], values: list[float | None]) -> Scored:
        """The weighted sum of one attempt's values."""
        names = [function.name for function in self.functions]
        terms = [w * v for w, v in zip(self.weights, values, strict=True) if v is not None]
        if not terms:
            error = TypeError(
                f"{' and '.join(names)} returned None, which means that no function of task.reward "
                "applies to the row; add a function that does, or leave the row out"
            )
            raise RewardError(calls[0].attempt, error)
        return Scored(
            score=math.fsum(terms),
            parts=dict(zip(names, values, strict=True)),
            metrics=[entry for call in calls for entry in call.metrics],
            extra={name: value for call in calls for name, value in call.extra.items()},
        )


class RewardedTask(Task):
    """A task that is scored by reward functions."""

    def __init__(self, rewards: WeightedRewards, right_at: float):
        self.right_at, self._rewards = right_at, rewards
        rewards.state = lambda: self.run_state()
        self._outcomes: dict[str, float] = {}

    def score(self, example: Example, answer: str) -> float:
        """The reward's value."""
        return self.scores([Attempt(example, answer)])[0].score

    def scores(self, attempts: Sequence[Attempt]) -> list[Scored]:
        """Scores of attempts, whose rewards run together."""
        return self._rewards(attempts)

    def scored(self, attempts: Sequence[Attempt]) -> list[Scored]:
        found = super().scored(attempts)
        for attempt, one in zip(attempts, found, strict=True):
            self._outcomes[_key(attempt)] = one.outcome
        for key in list(self._outcomes)[:-_NUM_OUTCOMES]:
            del self._outcomes[key]
        return found

    def outcome(
        self, example: Example, answer: str, completion_ids: list[int] | None = None
    ) -> float:
        """The outcome of the batch that the answer was last scored in, else a new one.

        Reports show single answers of an evaluation, and a reward may be a request to a server.
        """
        known = self._outcomes.get(_key(Attempt(example, answer, completion_ids)))
        return super().outcome(example, answer, completion_ids) if known is None else known


_NUM_OUTCOMES = 100_000
"""Number of outcomes that are kept for reports."""


def _key(attempt: Attempt) -> str:
    """A hash of all that a reward function can read of an attempt."""
    example = attempt.example
    read = fingerprint(example), example.answer, example.columns, attempt.answer
    return hashlib.sha256(repr((*read, attempt.completion_ids)).encode()).hexdigest()
