"""Intervals of 95 %, and the paired comparison of two models on the same problems.

| of | method |
|---|---|
| a share of problems, one run | Wilson's score interval (Wilson, 1927) |
| a mean over seeds | Student's t: mean ± t(n - 1) * s / sqrt(n), cut at the metric's bounds |
| the difference of two shares on the same problems | Newcombe's method 10 (1998), from Wilson's |
| whether two such shares differ | McNemar's exact test |

All lie within the bounds of what they estimate. A mean of shares lies between 0 and 1, so cutting
its interval there leaves out no value that the mean can have: the coverage stays 95 %.

Newcombe: Improved confidence intervals for the difference between binomial proportions based on
paired data, Statistics in Medicine 17 (1998), 2635-2650.
"""

import math
from dataclasses import dataclass
from statistics import mean, stdev

T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""Student's t at 0.975 for 1 to 10 degrees of freedom."""
Z = 1.959964
"""The normal distribution's quantile at 0.975."""
UNBOUNDED = (-math.inf, math.inf)


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval."""

    center: float
    low: float
    high: float


def mean_interval(
    values: list[float | None], bounds: tuple[float, float] = UNBOUNDED
) -> Interval | None:
    """Mean of at least two values with its interval, cut at `bounds`; None if a value is None."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    center = mean(known)
    half = t_quantile(len(known) - 1) * stdev(known) / math.sqrt(len(known))
    return Interval(center, max(bounds[0], center - half), min(bounds[1], center + half))


def share_interval(right: int, total: int) -> Interval:
    """`right` of `total` problems, with Wilson's interval. It is 0 to 1 for no problems."""
    if total == 0:
        return Interval(0.0, 0.0, 1.0)
    share, squared = right / total, Z * Z
    middle = (share + squared / (2 * total)) / (1 + squared / total)
    spread = share * (1 - share) / total + squared / (4 * total * total)
    half = Z * math.sqrt(spread) / (1 + squared / total)
    # Both ends are exact where rounding would leave the bounds.
    low = 0.0 if right == 0 else max(0.0, middle - half)
    high = 1.0 if right == total else min(1.0, middle + half)
    return Interval(share, low, high)


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same problems: of each problem, whether each answered correctly."""

    total: int
    """Number of problems."""
    both: int
    """Problems that both answered correctly."""
    only_first: int
    only_second: int
    difference: Interval
    """Share of the second model minus that of the first, -1 to 1."""
    p_value: float
    """McNemar's exact two-sided test of equal shares."""


def paired_comparison(first: str, second: str) -> PairedComparison:
    """Compare two strings with a `1` for each problem answered correctly, else a `0`.

    Raises ValueError if they are not of the same problems.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            "a paired comparison needs the same problems of both models, got "
            f"{len(first)} and {len(second)}; compare evaluations of equal problems"
        )
    pairs = list(zip(first, second, strict=True))
    both, only_first, only_second, neither = (
        pairs.count(pair) for pair in (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0"))
    )
    total = len(pairs)
    one, two = (share_interval(both + only, total) for only in (only_first, only_second))
    difference = two.center - one.center
    correlation = _correlation(both, only_first, only_second, neither)

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    low = difference - reach(two.center - two.low, one.high - one.center)
    high = difference + reach(two.high - two.center, one.center - one.low)
    differing = only_first + only_second
    fewer = min(only_first, only_second)
    tail = sum(math.comb(differing, k) for k in range(fewer + 1)) / 2**differing
    return PairedComparison(
        total,
        both,
        only_first,
        only_second,
        Interval(difference, max(-1.0, low), min(1.0, high)),
        min(1.0, 2 * tail),
    )


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Phi of the two outcomes, with Newcombe's continuity correction where it is positive."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second)
    margins *= only_first + neither
    if margins == 0:
        return 0.0
    product: float = both * neither - only_first * only_second
    total = both + only_first + only_second + neither
    if product > 0:
        product = max(product - total / 2, 0)
    return product / math.sqrt(margins)


def t_quantile(freedom: int) -> float:
    """Student's t at 0.975, to four digits; above 10 degrees by its series around the normal's."""
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3
