"""Intervals by hand, within their bounds, and the paired comparison of two models."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp.reports.interval import mean_interval, paired_comparison, share_interval
from mtp.reports.metrics import METRICS


def test_wilsons_interval_is_that_worked_by_hand():
    """8 of 10: (0.8 + z²/20 ± z sqrt(0.016 + z²/400)) / (1 + z²/10) with z² = 3.841459."""
    found = share_interval(8, 10)
    assert found.center == 0.8
    assert found.low == pytest.approx((0.8 + 0.19207 - 1.959964 * 0.160012) / 1.384146, abs=1e-5)
    assert found.high == pytest.approx((0.8 + 0.19207 + 1.959964 * 0.160012) / 1.384146, abs=1e-5)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, 1e-4))


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0.0, 0.0370), (100, 0.9630, 1.0)])
def test_a_share_of_none_or_all_has_an_interval_that_ends_there(right, low, high):
    found = share_interval(right, 100)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_a_mean_of_shares_is_cut_at_its_bounds_and_other_means_are_not():
    """0.0, 0.3, 0.9: mean 0.4, s = sqrt(0.42 / 2), t(2) = 4.3027: half 1.138."""
    half = 4.3027 * math.sqrt(0.21) / math.sqrt(3)
    accuracy, passes = METRICS["fast_accuracy"].bounds, METRICS["fast_passes"].bounds
    cut = mean_interval([0.0, 0.3, 0.9], accuracy)
    assert cut is not None and (cut.low, cut.high) == (0.0, 1.0)
    counted = mean_interval([0.0, 0.3, 0.9], passes)
    assert counted is not None and counted.low == 0.0
    assert counted.high == pytest.approx(0.4 + half, rel=1e-4)
    free = mean_interval([0.0, 0.3, 0.9])
    assert free is not None and free.low == pytest.approx(0.4 - half, rel=1e-3)
    assert mean_interval([0.1, None]) is None


def test_a_cell_shows_uneven_ends():
    metric = METRICS["fast_accuracy"]
    assert metric.cell(0.95, (0.93, 0.97)) == "95.0 ± 2.0 %"
    assert metric.cell(0.995, (0.981, 1.0)) == "99.5 (98.1–100.0) %"


def test_a_paired_comparison_is_that_worked_by_hand():
    """Ten problems: 4 solved by both, 1 by the first alone, 3 by the second alone, 2 by neither.

    Shares 0.5 (0.2366 to 0.7634) and 0.7 (0.3968 to 0.8922). phi: 4 * 2 - 1 * 3 = 5, which the
    continuity correction 10 / 2 makes 0. Low: 0.2 - sqrt(0.3032² + 0.2634²); high: 0.2 +
    sqrt(0.1922² + 0.2634²). McNemar: 2 * (1 + 4) / 2⁴.
    """
    found = paired_comparison("1111" + "1" + "000" + "00", "1111" + "0" + "111" + "00")
    assert (found.both, found.only_first, found.only_second, found.total) == (4, 1, 3, 10)
    assert found.difference.center == pytest.approx(0.2)
    assert found.difference.low == pytest.approx(0.2 - 0.4016, abs=2e-4)
    assert found.difference.high == pytest.approx(0.2 + 0.3261, abs=2e-4)
    assert found.p_value == 0.625


def test_models_that_agree_nearly_always_have_a_narrower_interval_than_two_samples():
    """90 of 100 both, 6 only the second: phi = (90 * 4 - 0 - 50) / sqrt(90 * 10 * 96 * 4)."""
    found = paired_comparison("1" * 90 + "0" * 10, "1" * 96 + "0" * 4)
    phi = 310 / math.sqrt(90 * 10 * 96 * 4)
    first, second = share_interval(90, 100), share_interval(96, 100)
    a, b = second.center - second.low, first.high - first.center
    assert found.difference.low == pytest.approx(0.06 - math.sqrt(a * a - 2 * phi * a * b + b * b))
    assert found.difference.low > 0.06 - math.hypot(a, b)
    assert found.p_value == pytest.approx(2 / 2**6)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_intervals_hold_their_center_within_bounds_and_turn_around(pairs):
    first, second = ("".join(str(int(one)) for one in side) for side in zip(*pairs, strict=True))
    there, back = paired_comparison(first, second), paired_comparison(second, first)
    interval = there.difference
    assert -1 <= interval.low <= interval.center <= interval.high <= 1
    assert back.difference.low == pytest.approx(-interval.high)
    assert 0 < there.p_value <= 1 and there.p_value == back.p_value


def test_other_problems_are_refused():
    with pytest.raises(ValueError, match="needs the same problems of both models, got 2 and 3"):
        paired_comparison("10", "101")
