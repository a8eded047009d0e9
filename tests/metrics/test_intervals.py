"""95 % intervals against numbers worked out elsewhere."""

from __future__ import annotations

import pytest

from edgecl.metrics.intervals import mean_interval, proportion_interval


@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [
        ([1, 2, 3, 4, 5], 3, 2.776 * 2.5**0.5 / 5**0.5),  # t(4, 0.975) = 2.776
        ([1.0, 2.0], 1.5, 12.706 * 0.5),  # t(1, 0.975)
        ([0.0] * 30 + [31.0], 1, 2.042 * 5.567764 / 31**0.5),  # t(30, 0.975), the last in the table
        ([0.0, 1.0] * 50, 0.5, 1.96 * 0.502519 / 10),  # the normal's
    ],
)
def test_mean_interval_is_students(values, mean, half):
    assert mean_interval(values) == pytest.approx((mean - half, mean + half), abs=1e-4)


def test_mean_interval_of_one_draw_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1.0])


@pytest.mark.parametrize(
    ("right", "count", "expected"),
    [
        (5, 10, (23.66, 76.34)),
        (81, 263, (25.53, 36.62)),
        (15, 148, (6.24, 16.05)),
        (0, 20, (0, 16.11)),
        (20, 20, (83.89, 100)),
    ],
)
def test_proportion_interval_is_wilsons(right, count, expected):
    """As Newcombe 1998 prints it, table I, method 3."""
    assert proportion_interval(100 * right / count, count) == pytest.approx(expected, abs=0.01)
