"""95 % intervals: of a mean over draws, and of a fraction of test images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the table, the normal's.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
_Z95 = 1.960


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % t-interval of the mean of two independent draws or more."""
    degrees = len(values) - 1
    quantile = _T95[degrees - 1] if degrees <= len(_T95) else _Z95
    half = quantile * stdev(values) / math.sqrt(len(values))
    center = mean(values)
    return center - half, center + half


def proportion_interval(percent: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a percentage counted over test images.

    Source: Wilson 1927, the score interval, which stays inside 0..100.
    """
    p, z2 = percent / 100, _Z95**2
    center = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)
