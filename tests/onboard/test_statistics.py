"""Percentiles and their intervals, against NumPy and against brute force."""

import numpy as np
import pytest

from edgecl.onboard.statistics import drift, percentile_interval, summarise


def test_percentiles_are_numpys_in_milliseconds():
    samples = np.random.default_rng(1).gamma(3.0, 0.002, size=2500)
    latency = summarise(samples, 1)["latency_ms"]
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert latency[name] == pytest.approx(1e3 * np.percentile(samples, percent), abs=1e-6)
    assert latency["mean"] == pytest.approx(1e3 * samples.mean(), abs=1e-6)


@pytest.mark.parametrize(("count", "known"), [(999, False), (1000, True)])
def test_p99_needs_a_thousand_samples(count, known):
    latency = summarise([0.001] * count, 1)["latency_ms"]
    assert (latency["p99"] is not None) is known
    assert (latency["ci95_p99"] is not None) is known
    assert latency["p90"] == 1.0


def test_throughput_counts_images():
    assert summarise([0.004] * 10, 16)["throughput_per_s"] == 4000.0


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_few_samples_have_an_ordered_interval_within_them(count):
    samples = np.linspace(0.001, 0.002, count)
    latency = summarise(samples, 1)["latency_ms"]
    low, high = latency["ci95_p50"]
    assert 1.0 <= low <= latency["p50"] <= high <= 2.0


@pytest.mark.parametrize("count", [7, 40, 401])
@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_interval_is_that_of_whole_resamples(count, fraction):
    draws = np.random.default_rng(2)
    values = np.sort(draws.lognormal(size=count))
    resamples = draws.choice(values, size=(20_000, count))
    low, high = np.percentile(np.percentile(resamples, 100 * fraction, axis=1), [2.5, 97.5])
    found = percentile_interval(values, fraction, resamples=20_000)
    # Two estimates of the same discrete distribution: at most a neighbouring value apart.
    ranks = np.searchsorted(values, [low, high, *found])
    assert abs(ranks[0] - ranks[2]) <= 1
    assert abs(ranks[1] - ranks[3]) <= 1


def test_interval_covers_the_true_median_about_95_times_in_100():
    draws = np.random.default_rng(3)
    trials = 400
    hits = 0
    for trial in range(trials):
        values = np.sort(draws.exponential(size=201))
        low, high = percentile_interval(values, 0.5, seed=trial)
        hits += low <= np.log(2) <= high
    assert 0.92 <= hits / trials <= 0.98


def test_interval_is_the_same_for_the_same_samples():
    values = np.sort(np.random.default_rng(4).normal(size=500))
    assert percentile_interval(values, 0.5) == percentile_interval(values, 0.5)


def test_drift_is_the_last_quarter_over_the_first():
    assert drift([1.0] * 10 + [5.0] * 20 + [1.5] * 10) == 1.5
    assert drift([1.0] * 7) is None
