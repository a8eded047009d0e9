"""INT8 graphs: arithmetic held to NumPy, what is kept in floats, and what the runtimes make of real nets."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecl.deploy.calibrate import calibrate
from edgecl.deploy.graph_index import first_block, quantizable

from .sketch import (
    FORMS,
    SIDE,
    Sketch,
    constants,
    cosine,
    images_of,
    kinds,
    maker,
    model_of,
    named,
    optimized_kinds,
    pair_of,
    quantize,
    quantize_net,
    ranges_of,
    relative,
    run,
    sketch_net,
)

NETS = [
    pytest.param("mobilenetv1_100", marks=pytest.mark.slow),
    "mobilenetv3_large_100",
    pytest.param("efficientnet_b0", marks=pytest.mark.slow),
]

# The half form --------------------------------------------------------------------------------------------------------


def test_half_form_is_half_inside_and_float32_outside():
    model = quantize_net("int8-trt-fp16")
    graph = model.graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {
        TensorProto.FLOAT
    }
    assert kinds(model)["Cast"] == 2
    assert {values.dtype for values in constants(model).values()} == {np.dtype(np.float16), np.dtype(np.int8)}


def overflowing_net():
    model = sketch_net(opset=19)
    for tensor in model.graph.initializer:
        if tensor.name in ("head_w", "head_b"):
            tensor.CopyFrom(numpy_helper.from_array(1e5 * numpy_helper.to_array(tensor), tensor.name))
        if tensor.name == "classes_w":
            tensor.CopyFrom(numpy_helper.from_array(1e-5 * numpy_helper.to_array(tensor), tensor.name))
    return model


def test_node_that_overflows_half_stays_in_float32_with_float32_scales():
    model, images = overflowing_net(), images_of(seed=1)
    quantized = quantize(model, form="int8-trt-fp16", ranges=ranges_of(model), images=images_of())
    head = named(quantized, "head_Conv")
    values = constants(quantized)
    for place in (0, 1):
        assert values[pair_of(quantized, head.input[place])[1].input[1]].dtype == np.float32
    assert values[pair_of(quantized, named(quantized, "depth_Conv").input[0])[1].input[1]].dtype == np.float16
    found, expected = run(quantized, images), run(model, images)
    assert np.isfinite(found).all()
    assert cosine(found, expected) > 0.97


# Arithmetic, held to NumPy ---------------------------------------------------------------------------------------------


def convolve(images, weights, bias, *, group):
    """A convolution with padding in float64, as a sum over kernel places."""
    _, _, height, width = images.shape
    outputs, per_group, kernel, _ = weights.shape
    pad = kernel // 2
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    result = np.zeros((len(images), outputs, height, width)) + bias.reshape(1, -1, 1, 1)
    for row in range(kernel):
        for column in range(kernel):
            window = padded[:, :, row : row + height, column : column + width]
            for output in range(outputs):
                first = output // (outputs // group) * per_group
                part = window[:, first : first + per_group]
                result[:, output] += np.einsum("nchw,c->nhw", part, weights[output, :, row, column])
    return result


def rounded(values, scale, zero, low, high):
    return (np.clip(np.rint(values / scale) + zero, low, high) - zero) * scale


@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("form", ["int8-trt", "int8-cpu"])
def test_one_convolution_is_what_numpy_computes(form, group):
    net = Sketch()
    net.conv("input", "a", inputs=16, outputs=16, kernel=3, group=group)
    net.node("Relu", ["a"], "output")
    model = net.model(channels=16)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 16)).astype(np.float32)
    ranges = {"input": (-2.0, 3.0), "output": (0.0, 2.0)}
    found = run(quantize(model, form=form, ranges=ranges), images, plain=True)
    weights, bias = net.constants["a_w"], net.constants["a_b"]
    w_scale = (np.abs(weights).max(axis=(1, 2, 3)) / 127).reshape(-1, 1, 1, 1)
    if form == "int8-cpu" and group == 1:
        # Two products of one sign have to fit into 16 bits, where convolutions are matrix products.
        ends = [
            np.sort(np.maximum(side, 0).reshape(16, -1), axis=1)[:, -2:].sum(1)
            for side in (weights, -weights)
        ]
        w_scale = np.maximum(w_scale, np.maximum(*ends).reshape(-1, 1, 1, 1) / 128)
    w = rounded(weights, w_scale, 0, -128, 127)
    if form == "int8-trt":
        x = rounded(images, 3.0 / 127, 0, -128, 127)
    else:
        x = rounded(images, 5.0 / 255, 102, 0, 255)
        step = 5.0 / 255 * w_scale.ravel()
        bias = np.rint(bias / step) * step
    expected = np.maximum(convolve(x, w, bias, group=group), 0)
    # A value in the middle between two steps may go either way in float32; anything else must agree.
    agree = np.abs(found - expected) < 1e-4
    assert agree.mean() > 0.999
    assert np.abs(found - expected).max() < 0.03


@pytest.mark.parametrize("form", FORMS)
def test_quantized_net_is_near_the_float_one(form):
    model, images = sketch_net(), images_of(64, seed=1)
    expected = run(model, images)
    found = run(quantize_net(form), images)
    assert cosine(found, expected) > 0.995
    assert np.abs(found - expected).max() > 1e-4


@pytest.mark.parametrize("form", ["int8-trt", "int8-cpu"])
@pytest.mark.parametrize("transposed", [True, False])
def test_classifier_is_quantized_per_class(form, transposed):
    """For TensorRT only where it is asked to: the classifier is kept by default."""
    model = sketch_net(transposed=transposed)
    quantized = quantize(model, form=form, ranges=ranges_of(model))
    node = named(quantized, "output_Gemm")
    if form == "int8-trt":
        assert list(node.input) == ["features", "classes_w", "classes_b"]
        return
    back = maker(quantized, node.input[1])
    assert helper.get_node_attr_value(back, "axis") == (0 if transposed else 1)
    assert constants(quantized)[back.input[1]].shape == (10,)


# What is kept ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_kept_nodes_compute_in_floats(form):
    kept = ["depth_Conv", "head_Conv"]
    model = quantize_net(form, keep=kept)
    values = constants(model)
    for name in kept:
        assert named(model, name).input[1] in values
        assert values[named(model, name).input[1]].dtype in (np.float32, np.float16)
    assert pair_of(model, named(model, "expand_Conv").input[0]) is not None


def test_keeping_more_comes_nearer_to_float():
    model, images = sketch_net(), images_of(64, seed=1)
    expected, ranges = run(model, images), ranges_of(sketch_net())
    for form in ("int8-trt", "int8-cpu"):
        names = quantizable(model, form)
        errors = [
            np.abs(
                run(quantize(model, form=form, ranges=ranges, keep=names[:count]), images) - expected
            ).mean()
            for count in (0, len(names))
        ]
        assert errors[1] < 1e-5 < errors[0], form


# Graphs that are a little odd ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_tensor_and_channel_of_zeros_are_quantized(form):
    model = sketch_net(opset=19)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name in ("expand_w", "expand_b"):
            values[:] = 0
        if tensor.name == "head_w":
            values[2] = 0
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    ranges = ranges_of(model)
    assert ranges["expand_act"] == (0.0, 0.0)
    quantized = quantize(model, form=form, ranges=ranges)
    for node in quantized.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = constants(quantized)[node.input[1]]
            assert np.isfinite(scale).all()
            assert (scale > 0).all()
    assert cosine(run(quantized, images_of()), run(model, images_of())) > 0.99


@pytest.mark.parametrize("form", FORMS)
def test_weights_shared_by_a_quantized_and_a_kept_convolution_serve_both(form):
    net = Sketch()
    net.conv("input", "a", inputs=16, outputs=16, bias=False)
    net.node("Relu", ["a"], "r")
    net.node("Conv", ["r", "a_w"], "b")
    net.node("Relu", ["b"], "s")
    net.node("Conv", ["s", "a_w"], "output")
    model = net.model(opset=19, channels=16)
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 16)).astype(np.float32)
    quantized = quantize(model, form=form, ranges=ranges_of(model, images), images=images, keep=["b_Conv"])
    assert named(quantized, "b_Conv").input[1] == "a_w"
    assert named(quantized, "a_Conv").input[1] != "a_w"
    assert relative(run(quantized, images), run(model, images)) < 0.05


@pytest.mark.parametrize("form", FORMS)
def test_same_bytes_each_time_and_the_source_untouched(form):
    model = sketch_net(opset=19)
    before = model.SerializeToString()
    ranges = ranges_of(model)
    first, second = (quantize(model, form=form, ranges=ranges).SerializeToString() for _ in range(2))
    assert first == second
    assert model.SerializeToString() == before


# Real nets, and the runtimes -------------------------------------------------------------------------------------------


# Of the first block: stem and depthwise; with the pointwise that a residual sum goes around; with a gate's two.
IN_FLOAT = {"mobilenetv1_100": 2, "mobilenetv3_large_100": 3, "efficientnet_b0": 4}


@pytest.mark.parametrize("arch", NETS)
def test_onnx_runtime_fuses_each_net_completely(exported, arch, tmp_path):
    model, ranges = exported(arch)
    found = optimized_kinds(quantize(model, form="int8-cpu", ranges=ranges), tmp_path)
    assert found["QLinearConv"] == kinds(model)["Conv"] - IN_FLOAT[arch]
    assert (found["QGemm"], found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1, 0)
    # What is left in float belongs to the first block.
    first = {node.op_type for node in model.graph.node if node.name in first_block(model)}
    assert {"Clip", "Relu", "HardSigmoid", "Sigmoid", "Mul", "Add", "Gemm"} & set(found) <= first


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", NETS)
def test_each_net_stays_near_fp32(exported, arch, form):
    model, ranges = exported(arch)
    images = images_of(8, SIDE, seed=2)
    found = run(quantize(model, form=form, ranges=ranges), images)
    assert cosine(found, run(model, images)) > 0.9


@pytest.mark.parametrize("form", ["int8-trt", "int8-cpu"])
def test_products_with_constant_weights_are_quantized_and_others_are_not(form):
    """As in attention: y = (x A) (x B)^T, then C."""
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(6, 6)).astype(np.float32) for name in "ABC"}
    nodes = [
        helper.make_node("MatMul", ["input", "A"], ["a"], name="a"),
        helper.make_node("MatMul", ["input", "B"], ["b"], name="b"),
        helper.make_node("Transpose", ["b"], ["t"], name="t", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["a", "t"], ["s"], name="s"),
        helper.make_node("MatMul", ["s", "C"], ["y"], name="y"),
    ]
    model = model_of(nodes, weights, shape=[1, 6, 6], out=[1, 6, 6], ends=("input", "y"))
    tokens = random.normal(size=(8, 6, 6)).astype(np.float32)
    ranges = calibrate(model, tokens, ["minmax"])["minmax"]
    quantized = quantize(model, form=form, ranges=ranges, images=tokens)
    dequantized = {node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    inputs = {
        node.name: set(node.input) & dequantized for node in quantized.graph.node if node.op_type == "MatMul"
    }
    assert {name: len(found) for name, found in inputs.items()} == {"a": 2, "b": 2, "s": 0, "y": 2}
    # In float64, each weight and token in 255 steps of its largest.
    x = tokens[:1].astype(np.float64)
    expected = (x @ weights["A"]) @ (x @ weights["B"]).transpose(0, 2, 1) @ weights["C"]
    found = run(quantized, tokens[:1])
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
