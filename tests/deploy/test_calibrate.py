"""Ranges of activations, held to the values themselves as onnx's own reference computes them."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgecl.deploy import calibrate as module
from edgecl.deploy.calibrate import entropy_threshold
from edgecl.errors import DataError

from .sketch import model_of

METHODS = ("minmax", "entropy", "percentile")


def make_net(scale=1.0):
    """Conv, ReLU, a hard-swish as two nodes, pool: two tensors that nobody quantizes before a ReLU."""
    random = np.random.default_rng(1)
    weights = {
        "w": random.normal(0, 0.3 * scale, (8, 3, 3, 3)),
        "b": random.normal(0, 0.1, 8),
        "v": random.normal(0, 0.3, (8, 8, 1, 1)),
    }
    nodes = [
        helper.make_node("Conv", ["input", "w", "b"], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "v"], ["c"], name="second"),
        helper.make_node("HardSigmoid", ["c"], ["g"], name="gate", alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", ["c", "g"], ["h"], name="product"),
        helper.make_node("GlobalAveragePool", ["h"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["output"], name="flatten"),
    ]
    weights = {name: values.astype(np.float32) for name, values in weights.items()}
    return model_of(nodes, weights, shape=["N", 3, 12, 12], out=["N", 8])


def make_images(count=24):
    return np.random.default_rng(0).normal(size=(count, 3, 12, 12)).astype(np.float32)


def calibrate(model, images, *, method):
    return module.calibrate(model, images, [method])[method]


def reference_values(model, images):
    names = ["r", "c", "g", "h", "p", "output"]
    opened = deepcopy(model)
    del opened.graph.output[:]
    opened.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    found = ReferenceEvaluator(opened).run(None, {"input": images})
    return {"input": images, **dict(zip(names, found, strict=True))}


def test_minmax_is_the_least_and_the_largest_value():
    expected = reference_values(make_net(), make_images())
    found = calibrate(make_net(), make_images(), method="minmax")
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx((values.min(), values.max()), abs=1e-5), name


def test_what_only_a_relu_reads_has_no_range():
    assert "a" not in calibrate(make_net(), make_images(), method="minmax")


def test_what_a_clip_above_zero_reads_has_one():
    model = make_net()
    model.graph.node[1].CopyFrom(helper.make_node("Clip", ["a", "low"], ["r"], name="clip"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(-1), "low"))
    assert "a" in calibrate(model, make_images(), method="minmax")
    model.graph.initializer[-1].CopyFrom(numpy_helper.from_array(np.float32(0), "low"))
    assert "a" not in calibrate(model, make_images(), method="minmax")


def test_percentile_leaves_out_the_outermost_values_at_both_ends():
    images = make_images(100)
    images[0, 0, 0, 0], images[3, 1, 5, 5] = 40, -20
    expected = reference_values(make_net(), images)["input"]
    least, largest = calibrate(make_net(), images, method="percentile")["input"]
    # 0.005 % of 43,200 values are 2.16: two are left out at either end, the third is inside.
    in_order = np.sort(expected.ravel())
    bin_width = 40 / module.BINS
    assert in_order[2] - bin_width <= least <= in_order[2]
    assert in_order[-3] <= largest <= in_order[-3] + bin_width
    assert largest < 10


def test_range_of_a_one_sided_tensor_stays_one_sided():
    for method in METHODS:
        least, largest = calibrate(make_net(), make_images(), method=method)["r"]
        assert least == 0
        assert largest > 0


def naive_entropy_threshold(counts, step):
    """The published procedure, written with loops over bins."""
    counts = [float(count) for count in counts]
    counts[0] = counts[1]
    best, least = len(counts), float("inf")
    for bins in range(128, len(counts) + 1, step):
        reference = counts[:bins]
        reference[-1] += sum(counts[bins:])
        other = []
        for level in range(128):
            part = counts[level * bins // 128 : (level + 1) * bins // 128]
            filled = sum(count > 0 for count in part)
            other += [sum(part) / filled if count > 0 else 0.0 for count in part]
        other = [max(q, 1e-4) if p else 0.0 for p, q in zip(reference, other, strict=True)]
        p_sum, q_sum = sum(reference), sum(other)
        divergence = sum(
            p / p_sum * np.log((p / p_sum) / (q / q_sum)) for p, q in zip(reference, other, strict=True) if p
        )
        if divergence < least:
            best, least = bins, divergence
    return best


@pytest.mark.parametrize("shape", ["normal", "laplace", "uniform", "outliers", "holes"])
def test_entropy_threshold_is_that_of_the_published_procedure(shape):
    random = np.random.default_rng(0)
    draws = {
        "normal": random.normal(size=50_000),
        "laplace": random.laplace(size=50_000),
        "uniform": random.uniform(0, 1, 50_000),
        "outliers": np.append(random.normal(size=50_000), [50.0, 60.0]),
        "holes": np.repeat(random.normal(size=200), 100),
    }[shape]
    counts = np.histogram(np.abs(draws), module.BINS)[0]
    found = entropy_threshold(counts.astype(np.float64))
    assert found == naive_entropy_threshold(counts, 16)


def test_entropy_cuts_rare_outliers_and_keeps_the_bulk():
    images = make_images(200)
    images[0, 0, 0, 0] = 60
    least, largest = calibrate(make_net(), images, method="entropy")["input"]
    assert 3 < largest < 15
    assert -15 < least < -3


def test_entropy_of_few_values_is_minmax():
    ranges = module.calibrate(make_net(), make_images(8), METHODS)
    assert ranges["entropy"]["p"] == ranges["minmax"]["p"]


def test_batches_are_as_small_as_memory_asks_for(monkeypatch):
    expected = calibrate(make_net(), make_images(), method="minmax")
    sizes = []
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(
        onnxruntime.InferenceSession,
        "run",
        lambda self, names, fed: sizes.append(len(fed["input"])) or run(self, names, fed),
    )
    per_image = 4 * (3 * 8 * 144 + 8 * 144 + 16)
    monkeypatch.setattr(module, "_BATCH_BYTES", 5 * per_image)
    found = calibrate(make_net(), make_images(), method="minmax")
    assert max(sizes) == 5
    assert sum(sizes) == 24
    for name, ends in expected.items():
        assert found[name] == pytest.approx(ends, abs=1e-5)


def test_sample_of_a_large_tensor_visits_every_row_and_column(monkeypatch):
    monkeypatch.setattr(module, "_MAX_COUNTED", 12)
    for length in (144, 8 * 144, 3 * 144):
        stride = module._stride(length)
        assert np.gcd(stride, length) == 1
        assert -(-length // stride) <= 12
    whole = calibrate(make_net(), make_images(200), method="percentile")["h"]
    monkeypatch.undo()
    assert calibrate(make_net(), make_images(200), method="percentile")["h"] == pytest.approx(whole, rel=0.3)


def test_image_that_is_not_finite_is_named():
    images = make_images()
    images[5, 1, 2, 3] = np.nan
    with pytest.raises(DataError, match="activation 'input' is not finite on the calibration images"):
        calibrate(make_net(), images, method="minmax")


def test_activation_that_overflows_is_named():
    with pytest.raises(DataError, match=r"activation 'r' is not finite.*largest inf"):
        calibrate(make_net(scale=3e38), make_images(), method="entropy")


def test_tensor_that_never_comes_near_zero_keeps_a_range():
    """Such as the gates of squeeze-and-excitation: the first bins of its histogram are empty."""
    counts = np.zeros(2048)
    counts[1900:] = 100.0
    assert entropy_threshold(counts) > 1900
    seen = module._Seen()
    values = np.random.default_rng(0).uniform(0.5, 0.55, size=(8, 4096)).astype(np.float32)
    seen.widen("gate", values)
    seen.count(values)
    for least, largest in (seen.minmax(), seen.percentile(), seen.entropy()):
        assert 0.5 <= least < 0.505
        assert 0.52 < largest <= 0.55
