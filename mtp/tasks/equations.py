"""Equations in English sentences, found and checked: `10 boxes * $20 = $200 in all.`

An equation is counted if both of its sides can be read and its left side holds an operator. All
else is not counted: sentences, variables, `Mike = 12`. In a chain each `=` counts by itself, with
what is directly on its two sides. They must be equal, or nearly so (to a millionth) if a number has
four decimals or more.

| text | how it is read |
|---|---|
| `$400,000`, `€7.50` | the number, without currency and commas |
| `12 clams/minute`, `4 per box` | the number; words after it are its unit |
| `*`, `x`, `×`, `/`, `÷` | operators, `x` only between two numbers |
| `3/4`, `half * 36` | fractions, also after `÷`: `12÷2/3` is 18 |
| `20%` | 0.2 |
| `20% of 60`, `1/3 of 60` | products |
| `2(76+35)` | a product |
| `T + 5`, `2x`, `3 * apples`, `√16` | nothing that can be read |
| `twice 5 + 3`, `20% of the 60`, `3 1/2` | nothing that can be read |

Left out: powers, number words other than `half`, equations in words (`6 times 9 equals 54`).
"""

import re
from fractions import Fraction

_WORD = r"[^\W\d_]"
_NUMBER = (
    r"(?<![\w.,])(?:[$€£¥]\s?)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+(?![\d|])|\|\d+)?(?:\s?%)?"
    r"(?![\w%])(?![.,]\d)"
)
"""`n|d` is how the value of parentheses is written: a fraction that nothing takes apart."""
_OPERAND = rf"(?:[-−](?=[$€£¥]?\d))?{_NUMBER}"
_UNIT = rf"(?:\s*/\s?{_WORD}{{2,}}|-{_WORD}{{2,}}|\s+(?![xX]\b){_WORD}[\w'’-]*)*"
_OPERATOR = r"\s*(?:[-−+*×÷/]|\b[xX]\b)\s*"
_EXPRESSION = rf"{_OPERAND}{_UNIT}(?:{_OPERATOR}{_OPERAND}{_UNIT})*"

_FIRST = re.compile(rf"\s*({_EXPRESSION})(?!\s*[-−+*×÷/(^]|\s*\b[xX]\b)")
_LAST = re.compile(rf"({_EXPRESSION})\s*$")
_PART = re.compile(rf"({_OPERAND}){_UNIT}({_OPERATOR})?")
_OPERATOR_BEFORE = re.compile(r"(?:[-−+*×÷/(^]|\b[xX])\s*$")

_PART_OF = (
    rf"(?:%|\d|\b(?:half|root|quarter|(?:thir|four|fif|six|seven|eigh|nin|ten|hundred)(?:d|th))s?)"
    rf"\s+of(?:\s+{_WORD}+)?"
)
_MORE_BEFORE = re.compile(
    rf"(?:\d|√|\b(?:twice|thrice|double|triple|times|minus|negative|sqrt|log|ln)|{_PART_OF})\s*$",
    re.IGNORECASE,
)
"""Text that makes an expression after it a part of another one."""
_MIXED = re.compile(
    rf"(?:\s*{_EXPRESSION}{_OPERATOR})?\s*{_OPERAND}(?:\s+(?!(?:and|or|so|then)\b){_WORD}+)?\s+\d"
)
"""A number that another one continues: `6 1/2`, `5 feet 8 inches`."""

_PAIR = re.compile(rf"({_OPERAND}{_UNIT})(\s*[+*×]\s*|\s+[xX]\s+)({_OPERAND}{_UNIT})(?=\s*=)")
"""A sum or a product of two operands up to the `=` after it."""

_BULLET = re.compile(r"^\s*(?:[-•*–]|\d+\.)\s+")
_ASIDE = re.compile(rf"\(\s*{_WORD}[^()]*\)")
"""Words in parentheses, as in `time(s)`."""
_CLAUSE_END = re.compile(r"[;!?|]|[,.:](?=\s|$)")
_PARENTHESES = re.compile(r"([\d)]\s?)?\(([^()]*)\)")
_SHARE_OF = re.compile(r"(%|/\d+|\bhalf)\s+of\s+(?=[$€£¥]?\d)")
_HALF = re.compile(r"\bhalf(?=\s*[*×]|\s+x\s)")

_TOLERANCE = 1e-6
"""Relative; for equations with a number that was rounded, such as 23.833333333333332."""
_ROUNDED = re.compile(r"\.\d{4}")


def equations(text: str) -> list[bool]:
    """For each equation that can be read, in order, whether it is true.

    `equations("He has 3 * $20 = $60.")` is `[True]`.
    """
    found = []
    for line in text.split("\n"):
        line = _ASIDE.sub(" ", _BULLET.sub("", line))
        for clause in _CLAUSE_END.split(line):
            clause = _HALF.sub("1/2", _SHARE_OF.sub(r"\1 * ", clause))
            tolerance = _TOLERANCE if _ROUNDED.search(clause) else 0.0
            sides = [_without_parentheses(side) for side in clause.split("=")]
            for left, right in zip(sides, sides[1:], strict=False):
                is_true = _compare(left, right, tolerance)
                if is_true is not None:
                    found.append(is_true)
    return found


def commuted(text: str) -> str:
    """The text with the operands of each sum and product of two exchanged.

    `10 boxes * $20 = $200` becomes `$20 * 10 boxes = $200`. Longer expressions stay as they are.
    """

    def exchanged(match: re.Match[str]) -> str:
        if _OPERATOR_BEFORE.search(text[: match.start()]):
            return match[0]
        return match[3] + match[2] + match[1]

    return _PAIR.sub(exchanged, text)


def _without_parentheses(side: str) -> str:
    """Parentheses around an expression replaced by its value, the inner ones first."""
    while True:
        for match in _PARENTHESES.finditer(side):
            before, inside = match[1] or "", match[2].strip()
            value = _value(inside) if re.fullmatch(_EXPRESSION, inside) else None
            if value is not None:
                sign, product = "-" if value < 0 else "", "*" if before else ""
                number = f"{sign}{abs(value.numerator)}|{value.denominator}"
                side = side[: match.start()] + before + product + number + side[match.end() :]
                break
        else:
            return side


def _compare(left: str, right: str, tolerance: float) -> bool | None:
    """Whether the expression that ends `left` equals the one that begins `right`.

    None if one of them cannot be read, or the left one holds no operator.
    """
    last, first = _LAST.search(left), _FIRST.match(right)
    if last is None or first is None:
        return None
    before = left[: last.start()]
    is_signed = last[1][0] in "-−" and before.strip()
    is_part = _OPERATOR_BEFORE.search(before) or _MORE_BEFORE.search(before)
    if is_signed or is_part or _MIXED.match(right):
        return None
    has_operator = len(_PART.findall(last[1])) > 1 or re.search(r"\d[/|]\d", last[1])
    values = _value(last[1]), _value(first[1])
    if not has_operator or values[0] is None or values[1] is None:
        return None
    return abs(values[0] - values[1]) <= tolerance * max(abs(values[0]), abs(values[1]))


def _value(expression: str) -> Fraction | None:
    """Value of a text that `_EXPRESSION` matches; None for a division by zero."""
    terms: list[Fraction] = []
    operator = "+"
    for number, following in _PART.findall(expression):
        if operator == "/" and "/" in number:  # 60/10/2: from left to right
            parts = [_number(part) for part in number.split("/")]
        else:
            parts = [_number(number)]
        for value in parts:
            if value is None or (operator in "/÷" and value == 0):
                return None
            if operator in "+-−":
                terms.append(value if operator == "+" else -value)
            elif operator in "/÷":
                terms[-1] /= value
            else:
                terms[-1] *= value
        operator = following.strip() or "+"
    return sum(terms, Fraction(0))


def _number(text: str) -> Fraction | None:
    """`-$1,200.50`, `20%`, `3/4`; None for a fraction over zero."""
    digits = re.sub(r"[$€£¥,\s%]", "", text.replace("−", "-"))
    numerator, _, denominator = digits.replace("|", "/").partition("/")
    if denominator and int(denominator) == 0:
        return None
    value = Fraction(numerator) / int(denominator or 1)
    return value / 100 if "%" in text else value
