"""Where quantization stands in a graph: the rules that TensorRT and ONNX Runtime ask for."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from edgecl.deploy.graph import portable

from .sketch import (
    TENSORRT_FORMS,
    Sketch,
    constants,
    images_of,
    kinds,
    maker,
    named,
    optimized_kinds,
    pair_of,
    quantize,
    quantize_net,
    ranges_of,
    relative,
    run,
)

# What TensorRT asks for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", TENSORRT_FORMS)
def test_all_zero_points_are_written_and_are_int8_zeros(form):
    model = quantize_net(form)
    values = constants(model)
    touched = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert touched
    for node in touched:
        assert len(node.input) == 3
        zero = values[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert zero.shape == values[node.input[1]].shape


@pytest.mark.parametrize("form", TENSORRT_FORMS)
def test_weights_are_floats_behind_a_pair_per_output_channel(form):
    model = quantize_net(form)
    values = constants(model)
    for name in ("expand", "depth", "project", "head"):
        node = named(model, f"{name}_Conv")
        source, there, back = pair_of(model, node.input[1])
        assert source == f"{name}_w"
        assert values[source].dtype == (np.float16 if form == "int8-trt-fp16" else np.float32)
        for end in (there, back):
            assert helper.get_node_attr_value(end, "axis") == 0
        assert values[there.input[1]].shape == (values[source].shape[0],)


@pytest.mark.parametrize("form", TENSORRT_FORMS)
def test_biases_are_left_alone(form):
    model = quantize_net(form)
    assert named(model, "expand_Conv").input[2] == "expand_b"
    assert not any(values.dtype == np.int32 for values in constants(model).values())


def test_activations_have_one_pair_whoever_reads_them():
    model = quantize_net("int8-trt")
    there = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert Counter(node.input[0] for node in there).most_common(1)[0][1] == 1
    expand, total = named(model, "expand_Conv"), named(model, "sum_Add")
    assert expand.input[0] == total.input[1]
    assert pair_of(model, total.input[1])[0] == "stem_act"


def test_only_the_skip_input_of_a_residual_sum_has_a_pair():
    total = named(quantize_net("int8-trt"), "sum_Add")
    assert total.input[0] == "project"
    assert total.input[1] != "stem_act"


def test_outputs_are_not_quantized():
    model = quantize_net("int8-trt")
    quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert not quantized & {"expand", "depth", "project", "head", "output", "sum_Add"}
    assert quantized >= {"stem_act", "expand_act", "gated", "sum"}


def test_of_two_convolutions_the_deeper_one_is_fused_with_the_sum():
    """A downsampling skip is a convolution too; the exporter may write it first or second."""
    for order in (["main", "short"], ["short", "main"]):
        net = Sketch()
        net.conv("input", "a", inputs=16, outputs=16)
        net.node("Relu", ["a"], "r")
        net.conv("r", "main", inputs=16, outputs=16)
        net.conv("input", "short", inputs=16, outputs=16)
        net.node("Add", order, "output")
        model = net.model(channels=16)
        images = np.random.default_rng(0).normal(size=(4, 16, 16, 16)).astype(np.float32)
        quantized = quantize(model, form="int8-trt", ranges=ranges_of(model, images))
        total = named(quantized, "output_Add")
        assert total.input[order.index("main")] == "main"
        assert pair_of(quantized, total.input[order.index("short")])[0] == "short"


def test_sum_behind_a_kept_convolution_keeps_its_skip():
    model = quantize_net("int8-trt", keep=["project_Conv"])
    assert list(named(model, "sum_Add").input) == ["project", "stem_act"]
    assert list(named(model, "project_Conv").input) == ["gated", "project_w"]


# What ONNX Runtime asks for --------------------------------------------------------------------------------------------


def test_every_operator_but_the_first_convolution_becomes_an_integer_kernel(tmp_path):
    found = optimized_kinds(quantize_net("int8-cpu"), tmp_path)
    expected = {
        "Conv": 1,
        "QuantizeLinear": 1,
        "QLinearConv": 6,
        "QLinearAdd": 3,
        "QLinearMul": 2,
        "QLinearGlobalAveragePool": 2,
        "Flatten": 1,
        "QGemm": 1,
    }
    assert found == expected


def test_activations_are_u8_and_weights_s8_with_int32_biases():
    model = quantize_net("int8-cpu")
    values = constants(model)
    depth = named(model, "depth_Conv")
    _, there, _ = pair_of(model, depth.input[0])
    assert values[there.input[2]].dtype == np.uint8
    codes, scale, zero = (values[name] for name in maker(model, depth.input[1]).input)
    assert (codes.dtype, scale.shape) == (np.int8, (32,))
    assert not zero.any()
    assert values[maker(model, depth.input[2]).input[0]].dtype == np.int32


def test_clips_that_saturation_computes_are_gone():
    model = quantize_net("int8-cpu")
    assert not kinds(model)["Clip"]
    assert not kinds(model)["Relu"]
    values = constants(model)
    there = pair_of(model, named(model, "depth_Conv").input[0])[1]
    assert values[there.input[2]] == 0


def test_relu_at_the_end_of_the_net_stays():
    net = Sketch()
    net.conv("input", "a", inputs=16, outputs=16)
    net.node("Relu", ["a"], "output")
    model = net.model(channels=16)
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 16)).astype(np.float32)
    found = run(quantize(model, form="int8-cpu", ranges=ranges_of(model, images)), images)
    assert found.min() == 0
    assert np.abs(found - run(model, images)).max() < 0.05 * found.max()


def test_clip_that_ends_below_zero_stays():
    net = Sketch()
    net.conv("input", "a", inputs=16, outputs=16)
    net.constant("low", -1)
    net.constant("high", 1)
    net.node("Clip", ["a", "low", "high"], "c")
    net.conv("c", "output", inputs=16, outputs=16)
    model = net.model(channels=16)
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 16)).astype(np.float32)
    quantized = quantize(model, form="int8-cpu", ranges=ranges_of(model, images))
    assert kinds(quantized)["Clip"] == 1
    assert relative(run(quantized, images), run(model, images)) < 0.05


def test_output_of_the_net_is_not_rounded():
    for classifier in (True, False):
        found = run(quantize_net("int8-cpu", classifier=classifier), images_of())
        assert len(np.unique(found)) > 0.5 * found.size


def test_hard_sigmoid_as_an_integer_sum_is_the_hard_sigmoid():
    net = Sketch()
    net.conv("input", "a", inputs=16, outputs=16)
    net.node("HardSigmoid", ["a"], "g", alpha=0.2, beta=0.4)
    net.node("Mul", ["a", "g"], "h")
    net.conv("h", "output", inputs=16, outputs=16)
    model = net.model(channels=16)
    images = 4 * np.random.default_rng(0).normal(size=(8, 16, 16, 16)).astype(np.float32)
    quantized = quantize(model, form="int8-cpu", ranges=ranges_of(model, images))
    assert not kinds(quantized)["HardSigmoid"]
    exposed = deepcopy(quantized)
    gate = named(quantized, "h_Mul").input[1]
    exposed.graph.output.insert(0, helper.make_empty_tensor_value_info(gate))
    source = next(name for name in named(quantized, "h_Mul").input if name != gate)
    exposed.graph.output.insert(1, helper.make_empty_tensor_value_info(source))
    session = onnxruntime.InferenceSession(exposed.SerializeToString(), providers=["CPUExecutionProvider"])
    found, x, _ = session.run(None, {"input": images})
    expected = np.clip(0.2 * x + 0.4, 0, 1)
    assert {0.0, 1.0} <= set(np.unique(found))
    assert np.abs(found - expected).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("hard_swish", ["keep", "hard_sigmoid", "clip"])
def test_every_form_of_hard_swish_is_fused(hard_swish, tmp_path):
    net = Sketch()
    net.conv("input", "a", inputs=16, outputs=16)
    net.node("HardSwish", ["a"], "h")
    net.conv("h", "output", inputs=16, outputs=16)
    model = portable(net.model(channels=16), opset=17, hard_swish=hard_swish)
    images = 4 * np.random.default_rng(0).normal(size=(8, 16, 16, 16)).astype(np.float32)
    found = {
        form: quantize(model, form=form, ranges=ranges_of(model, images)) for form in ("int8-cpu", "int8-trt")
    }
    fused = optimized_kinds(found["int8-cpu"], tmp_path)
    assert not {"Clip", "HardSigmoid", "HardSwish", "Mul", "Add"} & set(fused)
    expected = run(model, images)
    for quantized in found.values():
        assert np.abs(run(quantized, images) - expected).max() < 0.05 * np.abs(expected).max()


def test_bias_far_larger_than_its_weights_survives():
    net = Sketch()
    net.conv("input", "a", inputs=16, outputs=16)
    net.node("Relu", ["a"], "r")
    net.conv("r", "output", inputs=16, outputs=16)
    net.constants["a_w"][3] = 0
    net.constants["a_w"][5] *= 1e-12
    net.constants["a_b"][:] = 2.5
    model = net.model(channels=16)
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 16)).astype(np.float32)
    ranges = ranges_of(model, images)
    quantized = quantize(model, form="int8-cpu", ranges=ranges)
    values = constants(quantized)
    codes, scale, _ = (values[name] for name in maker(quantized, named(quantized, "a_Conv").input[2]).input)
    np.testing.assert_allclose(codes * scale.astype(np.float64), net.constants["a_b"], rtol=1e-4, atol=1e-3)
    assert relative(run(quantized, images), run(model, images)) < 0.05
