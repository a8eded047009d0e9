"""Percentiles and their intervals, against NumPy and against brute force."""

import numpy as np
import pytest

from edgecl.onboard.statistics import block_length, drift, percentile_interval, ratio_interval, summarize

NORMAL_P90 = 1.2815515655446004


def ar1(draws, trials, count, correlation):
    """`trials` series of standard normals (trials, count), each correlated with the one before."""
    noise = draws.normal(size=(trials, count)) * np.sqrt(1 - correlation**2)
    series = np.empty((trials, count))
    series[:, 0] = draws.normal(size=trials)
    for i in range(1, count):
        series[:, i] = correlation * series[:, i - 1] + noise[:, i]
    return series


def latencies(normals):
    """Latencies around 2 ms with the order of the normals, so that percentiles are those of the normals."""
    return 0.002 * np.exp(0.05 * normals)


def independent_interval(values, fraction, draws):
    """The bootstrap that takes samples one by one, written out whole."""
    resamples = draws.choice(values, size=(200, len(values)))
    return np.percentile(np.percentile(resamples, 100 * fraction, axis=1), [2.5, 97.5])


def quick_interval(values, fraction):
    return percentile_interval(values, fraction, resamples=300)


def coverage(series, fraction, truth, interval):
    """How often the interval holds the truth."""
    held = [low <= truth <= high for low, high in (interval(values, fraction) for values in series)]
    return np.mean(held)


def test_percentiles_are_numpys_in_milliseconds():
    samples = np.random.default_rng(1).gamma(3.0, 0.002, size=2500)
    latency = summarize(samples, 1)["latency_ms"]
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert latency[name] == pytest.approx(1e3 * np.percentile(samples, percent), abs=1e-6)
    assert latency["mean"] == pytest.approx(1e3 * samples.mean(), abs=1e-6)


@pytest.mark.parametrize(("count", "known"), [(999, False), (1000, True)])
def test_p99_needs_a_thousand_samples(count, known):
    latency = summarize([0.001] * count, 1)["latency_ms"]
    assert (latency["p99"] is not None) is known
    assert (latency["ci95_p99"] is not None) is known
    assert latency["p90"] == 1.0


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_few_samples_have_an_ordered_interval_within_them(count):
    samples = np.linspace(0.001, 0.002, count)
    latency = summarize(samples, 1)["latency_ms"]
    low, high = latency["ci95_p50"]
    assert 1.0 <= low <= latency["p50"] <= high <= 2.0


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_interval_of_independent_samples_is_that_of_whole_resamples(fraction):
    draws = np.random.default_rng(2)
    values = draws.lognormal(size=401)
    low, high = percentile_interval(values, fraction, resamples=4000)
    resamples = draws.choice(values, size=(4000, 401))
    expected = np.percentile(np.percentile(resamples, 100 * fraction, axis=1), [2.5, 97.5])
    # Blocks of three or four independent samples make the ends noisier, not farther apart.
    assert (high - low) == pytest.approx(expected[1] - expected[0], rel=0.3)
    assert low == pytest.approx(expected[0], rel=0.05)
    assert high == pytest.approx(expected[1], rel=0.05)


def test_interval_is_that_of_blocks_drawn_one_by_one():
    """Against a circular block bootstrap that writes every resample out."""
    draws = np.random.default_rng(9)
    values = latencies(ar1(draws, 1, 2048, 0.8)[0])
    length = 2048 // int(2048 / (3 * block_length(values > np.median(values))))
    starts = draws.integers(2048, size=(3000, 2048 // length))
    places = (starts[:, :, None] + np.arange(length)) % 2048
    resampled = np.median(values[places.reshape(3000, -1)], axis=1)
    low, high = percentile_interval(values, 0.5, resamples=3000)
    assert [low, high] == pytest.approx(np.percentile(resampled, [2.5, 97.5]), rel=0.002)
    assert high - low == pytest.approx(np.subtract(*np.percentile(resampled, [97.5, 2.5])), rel=0.12)


def test_intervals_of_independent_samples_hold_the_truth_about_95_times_in_100():
    draws = np.random.default_rng(3)
    series = latencies(draws.normal(size=(150, 400)))
    assert 0.91 <= coverage(series, 0.5, 0.002, quick_interval) <= 0.99


@pytest.mark.parametrize(("fraction", "z"), [(0.5, 0.0), (0.9, NORMAL_P90)])
def test_intervals_of_dependent_samples_hold_the_truth_where_independent_ones_fail(fraction, z):
    draws = np.random.default_rng(4)
    series = latencies(ar1(draws, 100, 4096, 0.9))
    truth = float(latencies(np.array(z)))
    assert coverage(series, fraction, truth, quick_interval) >= 0.89
    alone = coverage(series[:50], fraction, truth, lambda values, q: independent_interval(values, q, draws))
    assert alone <= 0.7


def test_block_length_follows_the_dependence():
    draws = np.random.default_rng(5)
    lengths = [
        np.median([block_length(one > 0) for one in ar1(draws, 20, 4096, correlation)])
        for correlation in (0.0, 0.5, 0.9, 0.97)
    ]
    assert lengths[0] <= 3
    assert lengths == sorted(lengths)
    assert lengths[2] >= 20
    assert lengths[3] <= 1024


def test_block_length_is_that_of_theory_for_an_ar1_series():
    """Politis & White 2004, section 4: the optimum for the mean of an AR(1) series, in closed form."""
    draws = np.random.default_rng(6)
    count, correlation = 20_000, 0.6
    # With R(k) = r^|k|: G = sum |k| R(k) = 2 r / (1 - r)^2, g(0) = sum R(k) = (1 + r) / (1 - r).
    g = 2 * correlation / (1 - correlation) ** 2
    spectrum = (1 + correlation) / (1 - correlation)
    optimum = (2 * g**2 / (4 / 3 * spectrum**2)) ** (1 / 3) * count ** (1 / 3)
    found = np.median([block_length(one) for one in ar1(draws, 20, count, correlation)])
    assert found == pytest.approx(optimum, rel=0.2)


def test_interval_of_a_million_samples_sees_slow_changes():
    """A clock that changes every 20,000 runs: the interval is of the changes, not of a million samples."""
    draws = np.random.default_rng(7)
    levels = np.repeat(draws.normal(size=50), 20_000)
    low, high = percentile_interval(latencies(levels + 0.1 * draws.normal(size=len(levels))), 0.5)
    assert low <= 0.002 <= high
    assert (high - low) / 0.002 > 0.01


def test_ratio_of_paired_rounds_has_a_narrow_interval_that_holds_the_truth():
    """Both nets slow down together by up to half; the ratio does not mind."""
    draws = np.random.default_rng(8)
    held = []
    for _ in range(100):
        rounds = 1 + 0.5 * draws.random(20)
        blocks_a = [2.0 * speed * np.exp(0.02 * draws.normal(size=60)) for speed in rounds]
        blocks_b = [speed * np.exp(0.02 * draws.normal(size=120)) for speed in rounds]
        ratio, interval = ratio_interval(blocks_a, blocks_b, resamples=300)
        assert ratio == pytest.approx(2.0, abs=0.02)
        held.append(interval[0] <= 2.0 <= interval[1])
        assert interval[1] - interval[0] < 0.02
    assert np.mean(held) >= 0.9


def test_one_disturbed_round_does_not_move_the_ratio():
    blocks = [[2.0, 2.1, 2.2]] * 11
    ratio, interval = ratio_interval([*blocks, [9.0, 9.0, 9.0]], [[1.0, 1.05, 1.1]] * 12)
    assert ratio == 2.0
    assert interval == (2.0, 2.0)


def test_ratio_of_few_rounds_has_no_interval():
    assert ratio_interval([[2.0], [2.0], [2.0]], [[1.0], [1.0], [1.0]]) == (2.0, None)
    with pytest.raises(ValueError, match="there are 2 blocks of A and 1 of B"):
        ratio_interval([[1.0], [1.0]], [[1.0]])


def test_spread_is_reported_and_not_clipped():
    samples = [0.001] * 99 + [0.101]
    found = summarize(samples, 16)
    assert found["throughput_per_s"] == 8000.0
    assert found["cov"] == pytest.approx(np.std(samples) / np.mean(samples), rel=1e-4)
    assert found["latency_ms"]["mean"] == 2.0


def test_drift_is_the_last_quarter_over_the_first():
    assert drift([1.0] * 10 + [5.0] * 20 + [1.5] * 10) == 1.5
    assert drift([1.0] * 7) is None
