"""Scales: what a range is rounded to."""

from __future__ import annotations

import numpy as np
import pytest

from edgecl.deploy.scales import asymmetric_scale, symmetric_scale, weight_scales


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


def test_scale_of_nothing_is_positive_and_finite():
    for dtype in (np.float32, np.float16):
        for ends in [(0.0, 0.0), (0.0, 1e-30), (-1e-45, 0.0)]:
            scale = symmetric_scale(*ends, dtype=dtype)
            assert np.isfinite(scale)
            assert scale > 0
    assert asymmetric_scale(0.0, 0.0)[0] > 0


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
