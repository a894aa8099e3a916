"""Chains of thought for a few reasoning-gym datasets, written by small solvers.

A thought is a list of short steps joined by `;`. The last step ends in the answer or implies it
directly (the last divisor of Euclid's algorithm, the order that comparisons prove). Numbers contain
no spaces: tokenizers that split digits then use one token per digit.

| dataset | thought |
|---|---|
| chain_sum | `37-85=-48;-48+46=-2` |
| leg_counting | `3 cow*4=12;2 bee*6=12;12+12=24` |
| letter_counting | `In 0;the 1;street 2;0+1+2=3` |
| number_sorting | `-3.0<1.5;1.5<20.0` |
| gcd | `1071%462=147;462%147=21;147%21=0` |
| basic_arithmetic | `3*4=12;12-20=-8` |
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Entry = dict[str, Any]
"""A reasoning-gym item: question, answer, metadata."""

_STEP = re.compile(r"(-?\d+)(?:([-+*/%])(-?\d+))?=(-?\d+)")
_LEGS = re.compile(r"(\d+) ([a-z ]+)\*(\d+)=(\d+)")
_COMPARISON = re.compile(r"(-?\d+(?:\.\d+)?)([<>=])(-?\d+(?:\.\d+)?)")
_SYMBOLS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "/",
}


@dataclass(frozen=True)
class Solver:
    """The chain of thought of one dataset, and the test of its steps."""

    think: Callable[[Entry], str]
    """The chain of thought of an item. Raises ValueError if the gold answer does not follow."""
    is_true: Callable[[str], bool] | None = None
    """True if one step is true; None if that cannot be decided from the step alone."""


def true_steps(thought: str, is_true: Callable[[str], bool]) -> tuple[int, int]:
    """(true steps, steps). An empty thought is one step that is not true."""
    steps = thought.split(";")
    return sum(map(is_true, steps)), len(steps)


def apply(left: int, operator: str, right: int) -> int | None:
    """`left operator right` over the integers, `/` rounding down; None for a division by zero."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if right == 0:
        return None
    return left // right if operator == "/" else left % right


def arithmetic_is_true(step: str) -> bool:
    """True if a step reads `a=c` or `a op b=c` and is correct."""
    match = _STEP.fullmatch(step)
    if match is None:
        return False
    left, operator, right, result = match.groups()
    value = int(left) if operator is None else apply(int(left), operator, int(right))
    return value == int(result)


def legs_are_true(step: str) -> bool:
    """True if a step is true arithmetic or reads `3 cow*4=12`, with a cow's number of legs."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    match = _LEGS.fullmatch(step)
    if match is None:
        return arithmetic_is_true(step)
    count, animal, legs, result = match.groups()
    return ANIMALS.get(animal) == int(legs) and int(count) * int(legs) == int(result)


def comparison_is_true(step: str) -> bool:
    """True if a step reads `a<b`, `a>b` or `a=b` and is correct."""
    match = _COMPARISON.fullmatch(step)
    if match is None:
        return False
    left, right = float(match[1]), float(match[3])
    return {"<": left < right, ">": left > right, "=": left == right}[match[2]]


def _fold(value: int, rest: list[tuple[str, int]]) -> tuple[list[str], int]:
    """Steps from left to right and their result; `7=7` if there is nothing to do."""
    steps = [] if rest else [f"{value}={value}"]
    for operator, right in rest:
        result = apply(value, operator, right)
        if result is None:
            raise ValueError(f"{value}{operator}{right} is a division by zero")
        steps.append(f"{value}{operator}{right}={result}")
        value = result
    return steps, value


def _concluded(steps: list[str], result: int, entry: Entry) -> str:
    if str(result) != entry["answer"]:
        raise ValueError(
            f"{';'.join(steps)} leads to {result}, the gold answer is {entry['answer']}"
        )
    return ";".join(steps)


def _operands(expression: str) -> tuple[int, list[tuple[str, int]]]:
    """`37 - 85 + -4` -> 37, [(-, 85), (+, -4)]."""
    first, *rest = expression.split()
    return int(first), [(op, int(n)) for op, n in zip(rest[::2], rest[1::2], strict=True)]


def chain_sum(entry: Entry) -> str:
    """Running totals, from left to right."""
    return _concluded(*_fold(*_operands(entry["metadata"]["expression"])), entry)


def leg_counting(entry: Entry) -> str:
    """Each animal's legs, added to the running total at once."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    steps: list[str] = []
    total = None
    for animal, count in entry["metadata"]["animals"].items():
        legs = count * ANIMALS[animal]
        steps.append(f"{count} {animal}*{ANIMALS[animal]}={legs}")
        if total is not None:
            steps.append(f"{total}+{legs}={total + legs}")
        total = legs + (total or 0)
    return _concluded(steps, total or 0, entry)


def letter_counting(entry: Entry) -> str:
    """The letter's count in each word, then their sum."""
    letter = entry["metadata"]["target_letter"]
    counts = [(word, word.lower().count(letter)) for word in entry["metadata"]["span"]]
    total = sum(count for _, count in counts)
    steps = [f"{word} {count}" for word, count in counts]
    return _concluded([*steps, f"{'+'.join(str(c) for _, c in counts)}={total}"], total, entry)


def number_sorting(entry: Entry) -> str:
    """Comparisons of neighbours in the order that the question requests."""
    numbers = entry["metadata"]["sorted_numbers"]
    sign = "<" if entry["metadata"]["direction"] == "ascending" else ">"
    if len(numbers) == 1:
        return f"{numbers[0]}={numbers[0]}"
    return ";".join(
        f"{a}{'=' if float(a) == float(b) else sign}{b}"
        for a, b in zip(numbers, numbers[1:], strict=False)
    )


def gcd(entry: Entry) -> str:
    """Euclid's algorithm, number by number; the last divisor is the answer."""
    first, *rest = entry["metadata"]["numbers"]
    steps, divisor = [], first
    for number in rest:
        larger, divisor = max(divisor, number), min(divisor, number)
        while larger % divisor:
            steps.append(f"{larger}%{divisor}={larger % divisor}")
            larger, divisor = divisor, larger % divisor
        steps.append(f"{larger}%{divisor}=0")
    return _concluded(steps, divisor, entry)


def basic_arithmetic(entry: Entry) -> str:
    """Operations in the order in which the gold answer was computed.

    That is the usual order with parentheses allowed, and from left to right without precedence if
    `allow_parentheses` is false. In the latter case the gold answers of questions with a division
    are wrong either way, which raises ValueError.
    """
    expression = entry["metadata"]["expression"]
    steps: list[str] = []
    result = _evaluate(ast.parse(expression.replace("/", "//").strip(), mode="eval").body, steps)
    if str(result) != entry["answer"] and "(" not in expression:
        steps, result = _fold(*_operands(expression))
    return _concluded(steps or [f"{result}={result}"], result, entry)


def _evaluate(node: ast.expr, steps: list[str]) -> int:
    """The value of integer arithmetic; appends a step for every operation."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if isinstance(node.operand, ast.Constant):
            return -_evaluate(node.operand, steps)
        left, operator, right = 0, "-", _evaluate(node.operand, steps)
    elif isinstance(node, ast.BinOp) and type(node.op) in _SYMBOLS:
        left, right = _evaluate(node.left, steps), _evaluate(node.right, steps)
        operator = _SYMBOLS[type(node.op)]
    else:
        raise ValueError(f"{ast.unparse(node)} is not integer arithmetic with + - * /")
    step, result = _fold(left, [(operator, right)])
    steps += step
    return result


SOLVERS: dict[str, Solver] = {
    "chain_sum": Solver(chain_sum, arithmetic_is_true),
    "leg_counting": Solver(leg_counting, legs_are_true),
    "letter_counting": Solver(letter_counting),
    "number_sorting": Solver(number_sorting, comparison_is_true),
    "gcd": Solver(gcd, arithmetic_is_true),
    "basic_arithmetic": Solver(basic_arithmetic, arithmetic_is_true),
}
"""Solvers by dataset."""
