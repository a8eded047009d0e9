"""A net between its ends computes what it computed: bytes in are normalized pixels, probabilities out are logits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from edgecl.config.target import Graph
from edgecl.deploy.ends import with_ends
from edgecl.deploy.fp16 import half
from edgecl.storage.records import Preprocessing

from . import sketch
from .sketch import FORMS, Sketch, quantize, ranges_of

SIDE = 16
PREPROCESSING = Preprocessing(
    image_size=SIDE, resize_size=SIDE, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
)
BYTES = np.random.default_rng(0).integers(0, 256, (4, 3, SIDE, SIDE), dtype=np.uint8)
CENTER, SPREAD = (np.array(values)[:, None, None] for values in (PREPROCESSING.mean, PREPROCESSING.std))
PIXELS = ((BYTES / 255 - CENTER) / SPREAD).astype(np.float32)


def net(kind, *, bias=True):
    """A first convolution of a kind, and a classifier of 5 classes."""
    made = Sketch()
    first = {"padded": 3, "patches": 1, "depthwise": 3}[kind]
    groups = 3 if kind == "depthwise" else 1
    tensor = made.conv("input", "first", inputs=3, outputs=6, kernel=first, group=groups, bias=bias, stride=2)
    tensor = made.node("Relu", [tensor], "relu")
    tensor = made.conv(tensor, "second", inputs=6, outputs=16, kernel=3)
    tensor = made.node("GlobalAveragePool", [tensor], "pool")
    tensor = made.node("Flatten", [tensor], "flat", axis=1)
    weights = made.constant("last_w", made.random.normal(size=(5, 16)))
    made.node("Gemm", [tensor, weights], "output", transB=1)
    return made.model(opset=19, side=SIDE, features=5)


def run(model, images):
    # A form for TensorRT is computed as it is written.
    return sketch.run(model, np.ascontiguousarray(images), plain=True)


def with_input(model, kind, **more):
    return with_ends(model, graph=Graph(opset=19, input=kind, **more), preprocessing=PREPROCESSING)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "explicit"), [("padded", {"Sub"}), ("patches", set()), ("depthwise", {"Sub", "Mul"})]
)
def test_normalization_is_folded_as_far_as_padding_allows_and_stays_exact(kind, explicit, bias):
    model = net(kind, bias=bias)
    before, expected = model.SerializeToString(), run(model, PIXELS)
    for layout, images in (("uint8", BYTES.transpose(0, 2, 3, 1)), ("uint8-nchw", BYTES)):
        raw = with_input(model, layout)
        assert {node.op_type for node in raw.graph.node} & {"Sub", "Mul"} == explicit
        assert raw.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
        np.testing.assert_allclose(run(raw, images), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert model.SerializeToString() == before


def test_a_mean_of_zero_needs_no_subtraction():
    model, plain = net("padded"), PREPROCESSING.model_copy(update={"mean": [0.0] * 3, "std": [1.0] * 3})
    raw = with_ends(model, graph=Graph(input="uint8-nchw"), preprocessing=plain)
    assert not {node.op_type for node in raw.graph.node} & {"Sub", "Mul"}
    expected = run(model, BYTES.astype(np.float32) / 255)
    np.testing.assert_allclose(run(raw, BYTES), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["padded", "patches"])
@pytest.mark.parametrize("form", ["fp16", *FORMS])
def test_every_precision_takes_bytes(form, kind):
    fp32 = net(kind)
    if form == "fp16":
        model = half(fp32, images=PIXELS)[0]
    else:
        model = quantize(fp32, form=form, ranges=ranges_of(fp32, PIXELS), images=PIXELS)
    expected = run(model, PIXELS)
    # Numbers rounded another way may fall on the other side of a step of 8 bits.
    far = 2e-3 if form == "fp16" else 2e-2
    found = run(with_input(model, "uint8"), BYTES.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(found, expected, rtol=0, atol=far * np.abs(expected).max())


def test_softmax_at_the_end_gives_probabilities_under_the_outputs_name():
    model = net("padded")
    logits = run(model, PIXELS).astype(np.float64)
    ended = with_input(model, "float32", softmax=True)
    assert [value.name for value in ended.graph.output] == ["output"]
    powers = np.exp(logits)
    np.testing.assert_allclose(run(ended, PIXELS), powers / powers.sum(1, keepdims=True), rtol=1e-5)
