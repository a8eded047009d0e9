"""Scales: what a range is rounded to."""

from __future__ import annotations

import numpy as np
import pytest

from edgecl.deploy.qdq import asymmetric_scale, paired_weight_scales, symmetric_scale, weight_scales


def test_symmetric_scale_reaches_the_larger_end_in_127_steps():
    assert symmetric_scale(-2.54, 1.0) == pytest.approx(0.02)
    assert symmetric_scale(0.0, 12.7) == pytest.approx(0.1)
    assert symmetric_scale(-2.54, 1.0).dtype == np.float32


def test_asymmetric_scale_holds_zero_exactly():
    for least, largest in [(-0.3, 6.0), (1.0, 3.0), (-5.0, -1.0), (0.0, 2.55)]:
        scale, zero = asymmetric_scale(least, largest)
        assert zero.dtype == np.uint8
        low, high = (0 - int(zero)) * float(scale), (255 - int(zero)) * float(scale)
        assert low <= min(least, 0) + float(scale)
        assert high >= max(largest, 0) - float(scale)
        assert low <= 0 <= high
    assert asymmetric_scale(0.0, 2.55)[1] == 0


def test_half_scales_are_rounded_so_that_nothing_is_clipped():
    reach = np.random.default_rng(0).uniform(1e-3, 50, 500)
    for value in reach:
        scale = symmetric_scale(-value, value, dtype=np.float16)
        assert scale.dtype == np.float16
        assert 127 * float(scale) >= value
        assert 127 * float(scale) <= value * 1.01


def test_weights_have_a_scale_per_output_channel():
    weights = np.arange(-12, 12).reshape(4, 3, 1, 2).astype(np.float32)
    weights[2] = 0
    expected = [12 / 127, 6 / 127, 1 / 127, 11 / 127]
    np.testing.assert_allclose(weight_scales(weights, axis=0), expected, rtol=1e-6)


def hard_weights():
    """Channels of every spread, of ties at half a step, of one sign, of one large weight, of zeros, of one weight."""
    random = np.random.default_rng(0)
    yield random.normal(size=(40, 3, 3, 3)) * random.uniform(1e-6, 1e3, (40, 1, 1, 1))
    yield np.abs(random.normal(size=(40, 5, 1, 1)))
    yield random.integers(-3, 4, (200, 4)) / 2.0
    yield np.ones((3, 8))
    yield -np.ones((3, 8))
    yield np.zeros((2, 8))
    yield random.normal(size=(5, 1, 1, 1))


def test_no_two_weights_of_one_sign_sum_to_more_than_128_steps():
    """The largest sum of two products with 255 is then 32,640, which 16 bits hold."""
    for weights in hard_weights():
        scale = paired_weight_scales(weights.astype(np.float32), axis=0).astype(np.float64)
        codes = np.rint(weights.astype(np.float32).reshape(len(weights), -1) / scale[:, None])
        assert np.abs(codes).max() <= 127
        for signed in (codes, -codes):
            pairs = np.sort(np.maximum(signed, 0), axis=1)[:, -2:].sum(1)
            assert pairs.max() * 255 < 2**15


def test_paired_scale_is_no_wider_than_it_must_be():
    for weights in hard_weights():
        found, single = paired_weight_scales(weights, axis=0), weight_scales(weights, axis=0)
        assert (found >= single).all()
        assert (found <= single * (127 / 64) * (1 + 1e-6)).all()
    alone = np.array([[1.0, 0.005, -0.9, 0.0], [-1.0, 0.005, 0.9, 0.001]])
    np.testing.assert_array_equal(paired_weight_scales(alone, axis=0), weight_scales(alone, axis=0))
    np.testing.assert_allclose(paired_weight_scales(np.ones((1, 4)), axis=0), [1 / 64])


def test_paired_scale_is_of_the_axis_that_counts_outputs():
    weights = np.random.default_rng(0).normal(size=(6, 9))
    np.testing.assert_array_equal(
        paired_weight_scales(weights.T, axis=1), paired_weight_scales(weights, axis=0)
    )
