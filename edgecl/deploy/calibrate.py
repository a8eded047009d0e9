"""Real images -> the range of every activation, from which the quantizer takes its scales.

Two passes over the images: the first finds least and largest values, the second counts histograms. Every method
reads the same histograms, so trying three methods costs no more runs than trying one. onnxruntime's calibrators (1.32)
give other ranges; the accuracy in docs/results.md is that of these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy
import onnx
from numpy.typing import NDArray
from onnx import shape_inference

from edgecl.deploy.graph_index import GraphIndex, clips_at_zero
from edgecl.deploy.session import open_tensors
from edgecl.errors import DataError

Method = Literal["minmax", "entropy", "percentile"]
Ranges = dict[str, tuple[float, float]]

BINS = 2048
"""Of a histogram of |x|; a signed one has twice as many."""
LEVELS = 128
"""Steps of a symmetric int8 scale on one side of zero."""
PERCENTILE = 99.99
"""Percent of the values that stay inside the range; what is cut is shared by both ends."""

# Of a tensor per image, evenly spread: a ten-thousandth of a few hundred images still is hundreds of values.
_MAX_COUNTED = 2**15
_BATCH_BYTES = 128 * 2**20
_MAX_BATCH = 64
# The divergence of a histogram with a few counts per bin is noise, and would cut real values off.
_MIN_COUNTS_PER_BIN = 16
_THRESHOLD_STEP = 16
# What an empty bin counts as where another histogram has something, as in Apache MXNet's calibrator.
_EMPTY = 1e-4


def calibrate(
    model: onnx.ModelProto, images: NDArray[numpy.float32], methods: Sequence[Method]
) -> dict[Method, Ranges]:
    """Run a float32 graph on images, and return which range each activation needs.

    min-max keeps every value. percentile leaves out the outermost 0.005 % at either end. entropy takes the threshold
    on |x| whose 128 levels lose least information (Kullback-Leibler), and min-max where fewer than 16 values per bin
    were seen.

    Args:
        model: one input (N, 3, H, W).
        images: (N, 3, H, W) float32 after preprocessing, the real thing.

    Returns:
        method -> tensor -> (least, largest), for the graph's input and every float32 output of a node, but for what
        only a ReLU reads: nobody quantizes before it.

    Raises:
        DataError: an activation that is not finite.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017, for the entropy threshold. As later calibrators do, the
        count of zeros is replaced by its neighbor's: zero is exact at any scale and says nothing about the threshold.
    """
    graph = shape_inference.infer_shapes(model).graph
    inner = {value.name: value for value in (*graph.value_info, *graph.output)}
    absorbed = _absorbed(graph)
    produced = [name for node in graph.node for name in node.output]
    names = [name for name in produced if name not in absorbed and _is_float(inner.get(name))]
    run = open_tensors(model, names, optimization="BASIC")
    batch = _batch_that_fits([inner[name] for name in names])
    seen = {name: _Seen() for name in (graph.input[0].name, *names)}
    for name, values in run(images, batch):
        seen[name].widen(name, values)
    if set(methods) - {"minmax"}:
        for name, values in run(images, batch):
            seen[name].count(values)
    pick = {"minmax": _Seen.minmax, "entropy": _Seen.entropy, "percentile": _Seen.percentile}
    return {method: {name: pick[method](values) for name, values in seen.items()} for method in methods}


@dataclass
class _Seen:
    """What one tensor was seen to hold."""

    least: float = math.inf
    largest: float = -math.inf
    counts: NDArray[numpy.int64] = field(default_factory=lambda: numpy.zeros(2 * BINS, numpy.int64))

    @property
    def _reach(self) -> float:
        return max(abs(self.least), abs(self.largest))

    def widen(self, name: str, values: NDArray[numpy.float32]) -> None:
        """Take the least and the largest value into account."""
        least, largest = float(values.min()), float(values.max())
        if not (math.isfinite(least) and math.isfinite(largest)):
            raise DataError(
                f"activation '{name}' is not finite on the calibration images (least {least}, largest {largest})",
                hint="a net that overflows in float32 cannot be quantized; check the images and the weights",
            )
        self.least, self.largest = min(self.least, least), max(self.largest, largest)

    def count(self, values: NDArray[numpy.float32]) -> None:
        """Add values to the histogram over (-reach, reach)."""
        if not self._reach:
            return
        flat = values.reshape(len(values), -1)
        sample = flat[:, :: _stride(flat.shape[1])]
        # In float32 a value at an edge may fall into the next bin, no further.
        places = sample.ravel() * numpy.float32(BINS / self._reach)
        places += numpy.float32(BINS)
        numpy.clip(places, 0, 2 * BINS - 1, out=places)
        self.counts += numpy.bincount(places.astype(numpy.int32), minlength=2 * BINS)

    def minmax(self) -> tuple[float, float]:
        """Return the least and the largest value."""
        return self.least, self.largest

    def percentile(self) -> tuple[float, float]:
        """Return the range that all but a ten-thousandth of the values lie in."""
        if not self._reach:
            return self.minmax()
        total = self.counts.sum()
        cut = total * (100 - PERCENTILE) / 200
        edges = numpy.linspace(-self._reach, self._reach, 2 * BINS + 1)
        running = numpy.cumsum(self.counts)
        low = edges[numpy.searchsorted(running, cut, side="right")]
        high = edges[numpy.searchsorted(running, total - cut, side="left") + 1]
        return max(self.least, float(low)), min(self.largest, float(high))

    def entropy(self) -> tuple[float, float]:
        """Return the range up to the threshold that loses least information."""
        if not self._reach or self.counts.sum() < _MIN_COUNTS_PER_BIN * BINS:
            return self.minmax()
        magnitudes = (self.counts[BINS:] + self.counts[BINS - 1 :: -1]).astype(numpy.float64)
        threshold = self._reach * entropy_threshold(magnitudes) / len(magnitudes)
        return max(self.least, -threshold), min(self.largest, threshold)


def entropy_threshold(counts: NDArray[numpy.float64]) -> int:
    """Choose how many leading bins of a histogram of |x| a symmetric int8 scale should cover.

    Args:
        counts: (B,) of |x|, B a multiple of LEVELS.

    Returns:
        the number of bins, LEVELS to B in steps of 16: where the clipped histogram, with what was cut added to its last
        bin, and the same in LEVELS steps differ least. Half of the values at least stay inside: a tensor that
        never comes near zero, such as a gate, has nothing to lose in its first bins.
    """
    counts = counts.copy()
    counts[0] = counts[1]
    best, least = len(counts), math.inf
    beyond = counts[::-1].cumsum()[::-1]
    for bins in range(LEVELS, len(counts) + 1, _THRESHOLD_STEP):
        if bins < len(counts) and beyond[bins] > beyond[0] / 2:
            continue
        inside = counts[:bins]
        clipped = inside.copy()
        if bins < len(counts):
            clipped[-1] += beyond[bins]
        filled = inside > 0
        starts = numpy.arange(LEVELS) * bins // LEVELS
        widths = numpy.add.reduceat(filled.astype(numpy.int64), starts)
        means = numpy.add.reduceat(inside, starts) / numpy.maximum(widths, 1)
        levelled = numpy.where(filled, numpy.repeat(means, numpy.diff(starts, append=bins)), 0.0)
        divergence = _divergence(clipped, levelled)
        if divergence < least:
            best, least = bins, divergence
    return best


def _divergence(reference: NDArray[numpy.float64], other: NDArray[numpy.float64]) -> float:
    """Return the Kullback-Leibler divergence of two histograms."""
    there = reference > 0
    share = reference[there] / reference.sum()
    # A threshold in the sparse tail often ends on an empty bin, which must not rule it out.
    filled = numpy.maximum(other[there], _EMPTY)
    return float((share * numpy.log(share / (filled / filled.sum()))).sum())


def _absorbed(graph: onnx.GraphProto) -> set[str]:
    """Return the tensors that a ReLU, bounded or not, alone reads."""
    links = GraphIndex(graph)
    return {
        name
        for name, nodes in links.readers.items()
        if len(nodes) == 1 and nodes[0].input[0] == name and clips_at_zero(nodes[0], links.constants)
    }


def _stride(length: int) -> int:
    """Return the step that leaves at most _MAX_COUNTED of so many values and visits all rows, columns and channels."""
    stride = -(-length // _MAX_COUNTED)
    while math.gcd(stride, length) > 1:
        stride += 1
    return stride


def _is_float(value: onnx.ValueInfoProto | None) -> bool:
    return value is not None and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def _batch_that_fits(values: Sequence[onnx.ValueInfoProto]) -> int:
    """Return how many images may run at once, all their activations in memory."""
    sizes = [[side.dim_value for side in value.type.tensor_type.shape.dim][1:] for value in values]
    per_image = 4 * sum(math.prod(size) for size in sizes)
    return int(max(1, min(_MAX_BATCH, _BATCH_BYTES // max(per_image, 1))))
