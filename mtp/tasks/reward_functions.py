"""Rewards named in a config: `exact`, `math`, or a function by its import path.

Three common signatures are supported, for one answer at a time:

| style | signature | arguments |
|---|---|---|
| trl | `f(prompts, completions, completion_ids, **columns)` | lists of length one |
| verl | `compute_score(data_source, solution_str, ground_truth, extra_info)` | one row |
| reasoning_gym | `score_answer(answer, entry)` | entry: the row, with question, answer, metadata |

Every style receives the extracted final answer, never the thought before it: a reward that searches
a whole text can be exploited by naming every candidate. `completion_ids` are the token ids of the
whole completion. A function may leave out parameters that it does not need. `weighted_rewards.py`
calls the functions and adds their values.

The trl style also gets TRL's `trainer_state`, `log_metric` and `log_extra`. If the row's prompt is
a list of messages, `prompts` and `completions` are lists of messages, as in TRL.

Left out: rewards that compare the completions of a group, and reward models.
"""

import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from .base import Attempt, RunState, same_text
from .math_answer import MathVerifier

STYLES = ("trl", "verl", "reasoning_gym")
_NEEDED = {
    "verl": {"solution_str", "ground_truth"},
    "trl": {"completions"},
    "reasoning_gym": {"answer", "entry"},
}


@dataclass
class Call:
    """One call of a reward function, and what the function logs during it."""

    attempt: Attempt
    state: RunState = field(default_factory=RunState)
    metrics: list[tuple[str, float]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Log a number, whose mean over a step's answers is written to the run's metrics."""
        found = number(value)
        if found is None:
            raise TypeError(f"log_metric must get a number, got None for {name!r}")
        self.metrics.append((str(name), found))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log a column of the answers; `values` has one entry per completion, here one."""
        if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != 1:
            raise TypeError(
                f"log_extra must get a list with one value per completion, got {values!r:.80}; "
                "there is one completion per call"
            )
        self.extra[str(column)] = _plain(values[0])


def _plain(value: Any) -> Any:
    """A value that JSON can hold; text of any other."""
    if isinstance(value, str | int | float | bool | None):
        return value
    try:
        return number(value)
    except TypeError:
        return str(value)


@dataclass(frozen=True)
class RewardFunction:
    """A function that scores one attempt."""

    name: str
    start: Callable[[Call], Any]
    """Calls the function. The result of an `async def` is awaitable."""
    read: Callable[[Any], float | None]
    """The value within a result; None if the function does not apply to the row."""
    is_limited: bool = True
    """Whether the function runs under a time limit; False if it has one of its own or needs none.
    """


def exact(attempt: Attempt) -> float:
    """1.0 if the answer equals the gold one, character by character in Unicode's normal form."""
    return float(same_text(attempt.answer, attempt.example.answer))


def load_reward(path: str, style: str = "auto") -> RewardFunction:
    """The reward function named by `task.reward` and `task.reward_style`.

    Raises ValueError naming the key if the path cannot be imported or the style is unclear.
    """
    if style not in ("auto", *STYLES):
        raise ValueError(f"task.reward_style must be auto or one of {STYLES}, got {style!r}")
    if path == "exact":
        return RewardFunction(path, lambda call: exact(call.attempt), number, is_limited=False)
    if path == "math":
        verifier = MathVerifier()
        return RewardFunction(
            path,
            lambda call: verifier(call.attempt.example.answer, call.attempt.answer),
            number,
            is_limited=False,
        )
    function = import_function(path)
    style = detect_style(function, path) if style == "auto" else style
    adapter = {"trl": _trl, "verl": _verl, "reasoning_gym": _reasoning_gym}[style]
    return adapter(path.partition(":")[2], function)


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


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the function accepts."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return arguments
    return {p.name: arguments[p.name] for p in parameters if p.name in arguments}


def number(value: Any) -> float | None:
    """Value of a reward; None stays None. Raises TypeError for anything but one number."""
    if value is None:
        return None
    if not isinstance(value, numbers.Real | Decimal):
        # numpy and torch have their own number types
        size = getattr(value, "shape", None)
        if size is None or math.prod(size) != 1 or not isinstance(value.item(), numbers.Real):
            raise TypeError(f"it must return a number, got {value!r:.80} ({type(value).__name__})")
        value = value.item()
    return float(value)


class NoTokenIds(Sequence[list[int]]):
    """Placeholder of `completion_ids` where they are not known; raises TypeError when read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("completion_ids are not known for an answer that was given as text")


def _trl(name: str, function: Callable[..., Any]) -> RewardFunction:
    own = ("prompt", "completion", "completion_ids")

    def start(call: Call) -> Any:
        example, ids = call.attempt.example, call.attempt.completion_ids
        columns = {"answer": example.answer, "thought": example.thought, **example.columns}
        message = {"role": "assistant", "content": call.attempt.answer}
        is_chat = bool(example.messages)
        arguments = {
            **{name: [value] for name, value in columns.items() if name not in own},
            "prompts": [list(example.messages) if is_chat else example.prompt],
            "completions": [[message] if is_chat else call.attempt.answer],
            "completion_ids": NoTokenIds() if ids is None else [ids],
            "trainer_state": None,
            "log_extra": call.log_extra,
            "log_metric": call.log_metric,
        }
        accepted = _accepted(function, arguments)
        if "trainer_state" in accepted:
            accepted["trainer_state"] = _trainer_state(call.state)
        return function(**accepted)

    def read(values: Any) -> float | None:
        if not hasattr(values, "__len__") or isinstance(values, str | bytes | dict):
            raise TypeError(f"it must return a list of numbers, got {values!r:.80}")
        if len(values) != 1:
            raise ValueError(f"it must return one number a completion, got {len(values)} for one")
        return number(values[0])

    return RewardFunction(name, start, read)


def _trainer_state(state: RunState) -> Any:
    """The run's position as transformers' TrainerState."""
    from transformers import TrainerState

    found = TrainerState(global_step=state.global_step, max_steps=state.max_steps)
    found.epoch = state.epoch  # type: ignore[assignment]
    return found


def _verl(name: str, function: Callable[..., Any]) -> RewardFunction:
    def start(call: Call) -> Any:
        example = call.attempt.example
        arguments = {
            "data_source": example.columns.get("data_source", ""),
            "solution_str": call.attempt.answer,
            "ground_truth": example.answer,
            "extra_info": example.columns.get("extra_info", example.columns),
        }
        return function(**_accepted(function, arguments))

    def read(value: Any) -> float | None:
        if isinstance(value, dict) and "score" not in value:
            raise TypeError(f"its dict must have a `score`, got {sorted(map(str, value))}")
        return number(value["score"] if isinstance(value, dict) else value)

    return RewardFunction(name, start, read)


def _reasoning_gym(name: str, function: Callable[..., Any]) -> RewardFunction:
    try:
        parameters = dict(inspect.signature(function).parameters)
    except ValueError:  # of a builtin, which is called by position
        parameters = {}
    named = [parameters.get(name) for name in ("answer", "entry")]
    is_named = all(p is not None and p.kind is not p.POSITIONAL_ONLY for p in named)

    def start(call: Call) -> Any:
        example = call.attempt.example
        entry = {"metadata": {}, **example.columns}
        entry |= {"question": example.prompt, "answer": example.answer}
        if is_named:
            return function(answer=call.attempt.answer, entry=entry)
        return function(call.attempt.answer, entry)

    return RewardFunction(name, start, number)
