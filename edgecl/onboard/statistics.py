"""Percentiles of latencies, and how sure one may be of them."""

from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np

P99_SAMPLES = 1000
"""Below so many samples fewer than ten lie beyond p99, and it is not reported."""


def percentile_interval(
    sorted_values: np.ndarray, fraction: float, resamples: int = 1000, seed: int = 0
) -> Tuple[float, float]:
    """Return the 95 % bootstrap interval of a percentile.

    The k-th smallest of a resample of N values is `values[floor(N * u)]`, where u is the k-th smallest of N
    uniforms and has a Beta distribution. So a resample costs two Beta draws instead of N values, and the
    result is distributed as if the whole resample had been drawn.

    Args:
        sorted_values: (N,) in ascending order, N >= 1.
        fraction: which percentile, 0 < fraction < 1; interpolated linearly, as NumPy does.
        resamples: how many.
        seed: of the draws.

    Source: Efron 1979, Annals of Statistics 7(1), the percentile method. It takes samples to be independent;
        latencies that drift are not, so read it together with the drift.
    """
    count = len(sorted_values)
    if count == 1:
        return float(sorted_values[0]), float(sorted_values[0])
    draws = np.random.RandomState(seed)
    position = (count - 1) * fraction
    below = min(int(position), count - 2)
    # u is the (below + 1)-th smallest of N uniforms, v the next one: the smallest of the rest, all above u.
    u = draws.beta(below + 1, count - below, size=resamples)
    v = u + (1 - u) * draws.beta(1, count - below - 1, size=resamples)
    lower = sorted_values[np.minimum((u * count).astype(np.int64), count - 1)]
    upper = sorted_values[np.minimum((v * count).astype(np.int64), count - 1)]
    low, high = np.percentile(lower + (position - below) * (upper - lower), [2.5, 97.5])
    return float(low), float(high)


def summarise(samples_s: Sequence[float], batch: int) -> Dict[str, Any]:
    """Return what a record says about a series of latencies.

    Args:
        samples_s: (N,) seconds per inference, N >= 1.
        batch: images per inference.

    Returns:
        latency_ms: p50, p90, p99 and mean per inference; p99 and its interval are None under 1,000 samples.
        throughput_per_s: images per second, one inference after the other.
        samples: N.
    """
    values = np.sort(np.asarray(samples_s, dtype=np.float64)) * 1e3
    latency: Dict[str, Any] = {}
    for name, fraction in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        known = name != "p99" or len(values) >= P99_SAMPLES
        latency[name] = _rounded(np.percentile(values, 100 * fraction)) if known else None
        interval = [_rounded(end) for end in percentile_interval(values, fraction)] if known else None
        latency["ci95_" + name] = interval
    latency["mean"] = _rounded(values.mean())
    latency["std"] = _rounded(values.std())
    latency["min"] = _rounded(values[0])
    mean_s = float(values.mean()) / 1e3
    return {
        "latency_ms": latency,
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
