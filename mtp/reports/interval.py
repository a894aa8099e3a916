"""The mean of a few runs and its 95 % interval by Student's t: mean ± t(n - 1) * s / sqrt(n)."""

import math
from statistics import mean, stdev

T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""Student's t at 0.975 for 1 to 10 degrees of freedom."""


def interval(values: list[float | None]) -> tuple[float | None, float | None]:
    """Mean and half the width of its 95 % interval, of at least two values; None if any is."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None, None
    return mean(known), t_quantile(len(known) - 1) * stdev(known) / math.sqrt(len(known))


def t_quantile(freedom: int) -> float:
    """Student's t at 0.975, to four digits; above 10 degrees by its series around the normal's."""
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
