"""Percentiles of latencies, and how sure one may be of them."""

import math
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import numpy as np

P99_SAMPLES = 1000
"""Below so many samples fewer than ten lie beyond p99, and it is not reported."""

RESAMPLES = 1000
# More blocks cost time and say little more: the width of an interval from 128 is known to about 5 %. Blocks longer
# than needed do no harm as long as there are many, and hold dependence that the block length missed.
MOST_BLOCKS = 128
# Blocks overlap: they start at every fourth part of their length.
PARTS = 4
# Blocks of the length that suits the variance best still miss some of the dependence, and intervals from them are
# too narrow; blocks so many times as long are right more often.
STRETCH = 3.0
LEAST_BLOCKS = 12
# Where the percentile of a resample is looked for: so many sample values, over so many standard errors.
THRESHOLDS = 128
REACH = 6.0
# Fewer rounds than this say nothing about how a ratio varies.
LEAST_ROUNDS = 4


def percentile_interval(
    samples: Union[Sequence[float], np.ndarray], fraction: float, resamples: int = RESAMPLES
) -> Tuple[float, float]:
    """Return the 95 % block bootstrap interval of a percentile of a series.

    One inference's latency is like the one before it (clocks, caches, other load), so drawing samples singly
    would promise too much: for an AR(1) series with correlation 0.9 its 95 % intervals hold the truth half of the
    time. Here whole blocks are drawn, long enough to hold the dependence, from a series closed to a circle.

    Args:
        samples: (N,) in order of time, N >= 1.
        fraction: which percentile, 0 < fraction < 1.

    Source: Künsch 1989, Annals of Statistics 17(3), blocks that overlap; Politis & Romano 1992, circular blocks.
        Block length: Politis & White 2004, Econometric Reviews 23(1), corrected by Patton, Politis & White 2009,
        on the series of 'above the percentile or not'. We differ: blocks start at every quarter of their length,
        are three times as long, and longer still until there are 128 of them at most; and for few blocks the interval is
        widened as Hesterberg 2015, The American Statistician 69(4), section 4.2, does for few samples.
    """
    values = np.asarray(samples, dtype=np.float64)
    count = len(values)
    if count == 1:
        return float(values[0]), float(values[0])
    found = float(np.percentile(values, 100 * fraction))
    length = block_length(values > found)
    if length > 1:
        length = max(length, min(STRETCH * length, count / LEAST_BLOCKS))
    blocks = max(1, min(MOST_BLOCKS, int(count / length)))
    parts = max(1, min(PARTS, count // blocks))
    groups = blocks * parts
    group_of = np.arange(count) * groups // count
    starts = np.random.RandomState(0).randint(groups, size=(resamples, blocks))
    drawn = _times_drawn(starts, groups)
    weights = np.sum([np.roll(drawn, shift, axis=1) for shift in range(parts)], axis=0)
    resampled = _percentiles_of_resamples(values, group_of, weights, fraction)
    low, high = np.percentile(resampled, _tails(blocks))
    return min(float(low), found), max(float(high), found)


def block_length(series: np.ndarray) -> float:
    """Return how long the blocks of a circular block bootstrap of a series (N,) should be, from 1 to N / 4.

    Source: Politis & White 2004, section 3.2, with the constants of Patton, Politis & White 2009.
    """
    count = len(series)
    centered = np.asarray(series, dtype=np.float64) - np.mean(series)
    variance = float(np.mean(centered**2))
    if count < 8 or variance == 0:
        return 1.0
    size = 1 << (2 * count - 1).bit_length()
    spectrum = np.fft.rfft(centered, size)
    covariances = np.fft.irfft(spectrum * np.conj(spectrum), size)[:count] / count
    quiet = max(5, int(math.ceil(math.sqrt(math.log10(count)))))
    most = min(int(math.ceil(math.sqrt(count))) + quiet, count - 1)
    band = 2 * math.sqrt(math.log10(count) / count)
    loud = np.flatnonzero(np.abs(covariances[1 : most + 1]) >= band * variance) + 1
    # The last lag before the first `quiet` lags in a row that are indistinguishable from none.
    edges = np.concatenate([[0], loud, [most + quiet + 1]])
    last = int(edges[np.argmax(np.diff(edges) > quiet)])
    lags = np.arange(1, min(2 * last, count - 1) + 1)
    if len(lags) == 0:
        return 1.0
    taper = np.clip(2 * (1 - lags / (2.0 * last)), 0, 1)  # 1 up to half of the lags, then down to 0
    tapered = taper * covariances[lags]
    longrun = variance + 2 * float(np.sum(tapered))
    slope = 2 * float(np.sum(tapered * lags))
    if longrun <= 0 or slope <= 0:
        return 1.0
    length = (2 * slope**2 / (4 / 3 * longrun**2)) ** (1 / 3) * count ** (1 / 3)
    return float(min(max(length, 1.0), count / 4))


def ratio_interval(
    blocks_a: Sequence[Sequence[float]],
    blocks_b: Sequence[Sequence[float]],
    resamples: int = RESAMPLES,
) -> Tuple[float, Optional[Tuple[float, float]]]:
    """Return by how much B is faster than A, with its 95 % interval, from series measured in turn.

    What a round did to both cancels in the ratio of its two medians; whole rounds are drawn.

    Returns:
        The median over the rounds of (p50 of A's block) / (p50 of B's block), and the interval; None for the
        interval under 4 rounds.

    Source: Efron 1979, Annals of Statistics 7(1), the percentile method, on paired rounds.
    """
    rounds = len(blocks_a)
    if rounds != len(blocks_b) or not rounds:
        raise ValueError("there are %d blocks of A and %d of B" % (rounds, len(blocks_b)))
    medians = [np.array([np.median(block) for block in blocks]) for blocks in (blocks_a, blocks_b)]
    ratios = medians[0] / medians[1]
    ratio = float(np.median(ratios))
    if rounds < LEAST_ROUNDS:
        return ratio, None
    drawn = np.random.RandomState(0).randint(rounds, size=(resamples, rounds))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), _tails(rounds))
    return ratio, (min(float(low), ratio), max(float(high), ratio))


def _tails(count: int) -> Tuple[float, float]:
    """Return which percentiles of resamples of `count` blocks bound 95 %: 2.5 and 97.5 for many, wider for few."""
    z, freedom = 1.959964, max(count - 1, 1)
    # Student's t, by Abramowitz & Stegun 26.7.5, in units of the spread of a resample.
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    tail = 50 * math.erfc(math.sqrt((freedom + 1) / freedom) * t / math.sqrt(2))
    return tail, 100 - tail


def _times_drawn(draws: np.ndarray, groups: int) -> np.ndarray:
    """Return how often each resample (R, B) drew each group, (R, groups)."""
    rows = np.arange(len(draws))[:, None] * groups
    counts = np.bincount((draws + rows).ravel(), minlength=len(draws) * groups).reshape(-1, groups)
    return counts.astype(np.float64)


def _percentiles_of_resamples(
    values: np.ndarray, group_of: np.ndarray, weights: np.ndarray, fraction: float
) -> np.ndarray:
    """Return the percentile of each of R resamples that hold group g of the values weights[:, g] times.

    A resample is never written out. Counting how many values of each group lie at or below each of a few hundred
    thresholds makes its distribution function a product of matrices, and the percentile the first threshold at
    which that reaches the fraction.
    """
    groups = weights.shape[1]
    sizes = np.bincount(group_of, minlength=groups).astype(np.float64)
    ordered = np.sort(values)
    center = ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]
    below = np.bincount(group_of, weights=values <= center, minlength=groups)
    totals = weights @ sizes
    spread = REACH * float(np.std((weights @ below) / totals)) + 2.0 / len(ordered)
    levels = np.linspace(max(fraction - spread, 0.0), min(fraction + spread, 1.0), THRESHOLDS)
    thresholds = np.unique(ordered[np.ceil(levels * (len(ordered) - 1)).astype(np.int64)])
    bins = group_of * (len(thresholds) + 1) + np.searchsorted(thresholds, values)
    counts = np.bincount(bins, minlength=groups * (len(thresholds) + 1)).reshape(groups, -1)
    at_or_below = np.cumsum(counts, axis=1)[:, :-1].astype(np.float64)
    reached = (weights @ at_or_below) / totals[:, None] >= fraction - 1e-12
    reached[:, -1] = True
    found: np.ndarray = thresholds[reached.argmax(axis=1)]
    return found


def summarize(samples_s: Sequence[float], batch: int) -> Dict[str, Any]:
    """Return what a record says about a series of latencies.

    Args:
        samples_s: (N,) seconds per inference, in order of time, N >= 1.
        batch: images per inference.

    Returns:
        latency_ms: p50, p90, p99 and mean per inference; p99 and its interval are None under 1,000 samples.
        cov: standard deviation over mean; above 0.025 trtexec calls a measurement unstable.
        throughput_per_s: images per second, one inference after the other.
        samples: N.
    """
    values = np.asarray(samples_s, dtype=np.float64) * 1e3
    latency: Dict[str, Any] = {}
    for name, fraction in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        known = name != "p99" or len(values) >= P99_SAMPLES
        latency[name] = _rounded(np.percentile(values, 100 * fraction)) if known else None
        interval = percentile_interval(values, fraction) if known else None
        latency["ci95_" + name] = [_rounded(end) for end in interval] if interval else None
    latency.update(mean=_rounded(values.mean()), std=_rounded(values.std()), min=_rounded(values.min()))
    mean_s = float(values.mean()) / 1e3
    return {
        "latency_ms": latency,
        "cov": round(float(values.std() / values.mean()), 5) if mean_s > 0 else None,
        "throughput_per_s": round(batch / mean_s, 3) if mean_s > 0 else None,
        "samples": len(values),
    }


def drift(samples_s: Sequence[float]) -> Optional[float]:
    """Return the median of the last quarter over that of the first, or None under 8 samples."""
    quarter = len(samples_s) // 4
    if quarter < 2:
        return None
    first = float(np.median(samples_s[:quarter]))
    return round(float(np.median(samples_s[-quarter:])) / first, 4) if first > 0 else None


def _rounded(milliseconds: float) -> float:
    return round(float(milliseconds), 6)  # nanoseconds
