"""Rewards named in a config: `exact`, `math`, or a function by its import path.

Three common signatures are supported, for one answer at a time:

| style | signature | arguments |
|---|---|---|
| trl | `f(prompts, completions, completion_ids, **columns)` | lists of length one |
| verl | `compute_score(data_source, solution_str, ground_truth, extra_info)` | one row |
| reasoning_gym | `score_answer(answer, entry)` | entry: the row, with question, answer, metadata |

Every style receives the extracted final answer, never the thought before it: a reward that searches
a whole text can be exploited by naming every candidate. A function may leave out parameters that it
does not need. Token ids are not known here; a function that reads `completion_ids` gets an error.

A reward runs under a time limit: code that a policy's answer sends into an endless loop must not
stop a run. An answer that takes too long is worth 0, with one warning. The limit interrupts Python
code; it cannot interrupt a C function that never checks signals, such as a power of huge integers.

Left out: rewards that compare the completions of a group, and TRL's message lists.
"""

import asyncio
import importlib
import inspect
import logging
import math
import numbers
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from types import FrameType
from typing import Any

from .base import Example, same_text
from .math_answer import MathVerifier

Reward = Callable[[Example, str], float]
"""(example, final answer) -> score."""
_log = logging.getLogger(__name__)
STYLES = ("trl", "verl", "reasoning_gym")
_NEEDED = {
    "verl": {"solution_str", "ground_truth"},
    "trl": {"completions"},
    "reasoning_gym": {"answer", "entry"},
}


def exact(example: Example, answer: str) -> float:
    """1.0 if the answer equals the gold one, character by character in Unicode's normal form."""
    return float(same_text(answer, example.answer))


def load_reward(path: str, style: str = "auto", seconds: float = 10.0) -> Reward:
    """The reward named by `task.reward` and `task.reward_style`, with `seconds` per answer at most.

    Raises ValueError naming the key if the path cannot be imported or the style is unclear.
    """
    if style not in ("auto", *STYLES):
        raise ValueError(f"task.reward_style must be auto or one of {STYLES}, got {style!r}")
    if path == "exact":
        return exact
    if path == "math":
        verifier = MathVerifier()
        return lambda example, answer: verifier(example.answer, answer)
    function = import_function(path)
    style = detect_style(function, path) if style == "auto" else style
    adapter = {"trl": _trl, "verl": _verl, "reasoning_gym": _reasoning_gym}[style]
    return limited(adapter(function), path, seconds)


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
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limited(reward: Reward, path: str, seconds: float) -> Reward:
    """The reward, worth 0 for an answer that takes it longer than `seconds`."""
    if seconds <= 0:
        raise ValueError(f"task.reward_seconds must be above 0, got {seconds}")
    warned = False

    def within(example: Example, answer: str) -> float:
        nonlocal warned
        try:
            with time_limit(seconds):
                return reward(example, answer)
        except TookTooLong:
            if not warned:
                _log.warning(
                    "%s took over task.reward_seconds=%g for the answer %r, which is worth 0; "
                    "further ones are not reported",
                    path,
                    seconds,
                    answer[:80],
                )
            warned = True
            return 0.0

    return within


def import_function(path: str) -> Callable[..., Any]:
    """`package.module:function` -> the function."""
    expected = "task.reward must be exact, math or an import path `package.module:function`"
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{expected}, got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # any error that the module's own code raises
        raise ValueError(
            f"{expected}, but importing {module_name!r} failed: {error!r}; install it or put its "
            "folder on PYTHONPATH"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = sorted(n for n, f in vars(module).items() if inspect.isfunction(f))
        raise ValueError(
            f"{expected}, but {module_name!r} has no function {name!r}; it has {found}"
        )
    return function


def detect_style(function: Callable[..., Any], path: str) -> str:
    """The style whose parameter names a function has."""
    names = set(_parameters(function, path))
    for style, needed in _NEEDED.items():
        if needed <= names:
            return style
    raise ValueError(
        f"task.reward_style=auto cannot determine the style of {path} from its parameters "
        f"{sorted(names)}; expected {' or '.join(str(sorted(n)) for n in _NEEDED.values())}: set "
        f"task.reward_style to one of {STYLES}"
    )


def _parameters(function: Callable[..., Any], path: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise ValueError(
            f"task.reward must be a function whose parameters Python knows, got {path}; write a "
            "function that calls it"
        ) from None


def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Result of a function, or of its coroutine: `async def` rewards are awaited.

    Each call has its own event loop.
    """
    value = function(*arguments, **named)
    if not inspect.isawaitable(value):
        return value

    async def awaited() -> Any:
        return await value

    return asyncio.run(awaited())


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the function accepts."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return arguments
    return {p.name: arguments[p.name] for p in parameters if p.name in arguments}


def _number(value: Any) -> float:
    """Value of a reward. Raises TypeError unless it is one number."""
    if value is None:
        raise TypeError("it returned None; one reward scores every row here, so leave out the rows")
    if not isinstance(value, numbers.Real | Decimal):
        # numpy and torch have their own number types
        size = getattr(value, "shape", None)
        if size is None or math.prod(size) != 1 or not isinstance(value.item(), numbers.Real):
            raise TypeError(f"it must return a number, got {value!r:.80} ({type(value).__name__})")
        value = value.item()
    return float(value)


class NoTokenIds(Sequence[list[int]]):
    """Placeholder of `completion_ids`; raises TypeError when it is read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(
            "completion_ids are not known to outcomes, which verify the final answer's text; use "
            "completions, and reward.token_cost for a cost of length"
        )


def _trl(function: Callable[..., Any]) -> Reward:
    def reward(example: Example, answer: str) -> float:
        columns = {
            "answer": example.answer,
            "thought": example.thought,
            **{k: v for k, v in example.columns.items() if k not in ("prompt", "completion")},
        }
        arguments = {
            **{name: [value] for name, value in columns.items()},
            "prompts": [example.prompt],
            "completions": [answer],
            "completion_ids": NoTokenIds(),
        }
        values = call(function, **_accepted(function, arguments))
        if not hasattr(values, "__len__") or isinstance(values, str | bytes | dict):
            raise TypeError(f"it must return a list of numbers, got {values!r:.80}")
        if len(values) != 1:
            raise ValueError(f"it must return one number a completion, got {len(values)} for one")
        return _number(values[0])

    return reward


def _verl(function: Callable[..., Any]) -> Reward:
    def reward(example: Example, answer: str) -> float:
        arguments = {
            "data_source": example.columns.get("data_source", ""),
            "solution_str": answer,
            "ground_truth": example.answer,
            "extra_info": example.columns.get("extra_info", example.columns),
        }
        value = call(function, **_accepted(function, arguments))
        if isinstance(value, dict) and "score" not in value:
            raise TypeError(f"its dict must have a `score`, got {sorted(map(str, value))}")
        return _number(value["score"] if isinstance(value, dict) else value)

    return reward


def _reasoning_gym(function: Callable[..., Any]) -> Reward:
    def reward(example: Example, answer: str) -> float:
        entry = {"metadata": {}, **example.columns}
        entry |= {"question": example.prompt, "answer": example.answer}
        return _number(call(function, answer, entry))

    return reward
