"""Scales and zero points of INT8, from ranges and weights."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

Array = NDArray[Any]

_LEAST_SCALE = {numpy.dtype(numpy.float32): 2.0**-100, numpy.dtype(numpy.float16): 2.0**-20}
"""Smaller scales lose their digits or become zero, which no runtime takes."""


def symmetric_scale(least: float, largest: float, *, dtype: Any = numpy.float32) -> Array:
    """Return the scale of S8 with zero point 0: () of dtype, positive; 127 steps reach the larger end."""
    reach = max(abs(least), abs(largest))
    return representable(numpy.asarray((reach or 1.0) / 127), dtype)


def asymmetric_scale(least: float, largest: float) -> tuple[Array, Array]:
    """Return scale and zero point of U8: () float32, positive, and () uint8; zero is always in the range."""
    least, largest = min(least, 0.0), max(largest, 0.0)
    scale = representable(numpy.asarray(((largest - least) or 1.0) / 255), numpy.float32)
    zero = numpy.clip(numpy.rint(-least / float(scale)), 0, 255)
    return scale, numpy.asarray(zero, numpy.uint8)


def weight_scales(weights: Array, *, axis: int, dtype: Any = numpy.float32) -> Array:
    """Return the S8 scale of every output channel: (O,) of dtype, positive, 1/127 for a channel of zeros."""
    reach = numpy.abs(weights.astype(numpy.float64)).max(
        axis=tuple(other for other in range(weights.ndim) if other != axis)
    )
    return representable(numpy.where(reach > 0, reach, 1.0) / 127, dtype)


def paired_weight_scales(weights: Array, *, axis: int) -> Array:
    """Return the S8 scale of every output channel at which sums of two products with U8 fit into 16 bits.

    x86-64 without VNNI multiplies two neighbors at once and adds them with saturation (`vpmaddubsw`). No such sum
    saturates where no two weights of a channel that have the same sign exceed 128 steps together: 128 * 255 < 2**15.
    Which weights are neighbors is the kernel's choice, so the two largest decide.

    Returns:
        (O,) float32, positive; from `weight_scales` up to about twice that.
    """
    single = weight_scales(weights, axis=axis)
    channels = numpy.moveaxis(weights.astype(numpy.float64), axis, 0).reshape(weights.shape[axis], -1)
    if channels.shape[1] < 2:
        return single
    ends = [numpy.partition(numpy.maximum(sign * channels, 0), -2, axis=1)[:, -2:].sum(1) for sign in (1, -1)]
    return numpy.maximum(single, representable(numpy.maximum(*ends) / 128, numpy.float32))


def representable(scale: Array, dtype: Any) -> Array:
    """Round a scale up to the next number of a type, so that the largest value is not clipped."""
    dtype = numpy.dtype(dtype)
    rounded = scale.astype(dtype)
    rounded = numpy.where(
        rounded.astype(numpy.float64) < scale, numpy.nextafter(rounded, dtype.type(numpy.inf)), rounded
    )
    return numpy.asarray(numpy.maximum(rounded, dtype.type(_LEAST_SCALE[dtype])), dtype)
