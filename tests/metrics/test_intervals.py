"""95 % intervals against numbers worked out elsewhere."""

from __future__ import annotations

import pytest

from edgecl.metrics.intervals import mean_interval, proportion_interval


def test_mean_interval_of_one_to_five():
    # t(4, 0.975) = 2.776; s = sqrt(2.5); half = 2.776 * 1.5811 / sqrt(5) = 1.963
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.963, 3 + 1.963), abs=5e-4)


def test_mean_interval_of_two_draws_is_wide():
    # t(1, 0.975) = 12.706; s = 0.7071; half = 12.706 * 0.7071 / 1.4142 = 6.353
    assert mean_interval([1.0, 2.0]) == pytest.approx((1.5 - 6.353, 1.5 + 6.353), abs=1e-3)


def test_mean_interval_of_many_draws_uses_the_normal_quantile():
    values = [0.0, 1.0] * 50
    half = 1.96 * 0.502519 / 10
    assert mean_interval(values) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)


def test_mean_interval_of_31_draws_is_the_last_in_the_table():
    # t(30, 0.975) = 2.042
    values = [0.0] * 30 + [31.0]
    half = 2.042 * 5.567764 / 31**0.5
    assert mean_interval(values) == pytest.approx((1 - half, 1 + half), abs=1e-3)


def test_mean_interval_of_one_draw_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1.0])


def test_wilson_interval_of_half():
    # Newcombe 1998: 5 of 10 -> 0.2366 to 0.7634
    assert proportion_interval(50, 10) == pytest.approx((23.66, 76.34), abs=0.01)


def test_wilson_interval_of_81_of_263():
    # Newcombe 1998, table I, method 3
    assert proportion_interval(100 * 81 / 263, 263) == pytest.approx((25.53, 36.62), abs=0.01)


def test_wilson_interval_of_15_of_148():
    assert proportion_interval(100 * 15 / 148, 148) == pytest.approx((6.24, 16.05), abs=0.01)


@pytest.mark.parametrize(("percent", "expected"), [(0, (0, 16.11)), (100, (83.89, 100))])
def test_wilson_interval_stays_inside_0_to_100(percent, expected):
    # Newcombe 1998: 0 of 20 -> 0 to 0.1611
    assert proportion_interval(percent, 20) == pytest.approx(expected, abs=0.01)
