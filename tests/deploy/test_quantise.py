"""INT8 graphs: the rules each runtime asks for, arithmetic held to NumPy, and what the runtimes make of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgecl.deploy.calibrate import calibrate
from edgecl.deploy.graph import portable
from edgecl.deploy.onnx import onnx_from_net
from edgecl.deploy.quantise import quantise
from edgecl.deploy.scales import asymmetric_scale, symmetric_scale, weight_scales
from edgecl.deploy.structure import baseline_keep, default_keep, first_block, quantisable
from edgecl.errors import DataError, TargetError
from edgecl.nets.backbone import create_backbone
from edgecl.target import Graph

FORMS = ("int8-trt", "int8-trt-fp16", "int8-cpu")
TENSORRT_FORMS = ("int8-trt", "int8-trt-fp16")
NETS = [
    pytest.param("mobilenetv1_100", marks=pytest.mark.slow),
    "mobilenetv3_large_100",
    pytest.param("efficientnet_b0", marks=pytest.mark.slow),
]
SIDE = 64


# A small net with all that matters, written by hand ------------------------------------------------------------------


class Sketch:
    """Nodes and constants of a graph in the making."""

    def __init__(self):
        self.random = np.random.default_rng(7)
        self.nodes, self.constants = [], {}

    def node(self, kind, inputs, output, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}_{kind}", **attributes))
        return output

    def constant(self, name, values):
        self.constants[name] = np.asarray(values, np.float32)
        return name

    def conv(self, source, output, *, inputs, outputs, kernel=1, group=1, bias=True, stride=1):
        shape = (outputs, inputs // group, kernel, kernel)
        # Channels of very different size, as batch norm leaves them.
        size = self.random.uniform(0.05, 1.0, (outputs, 1, 1, 1))
        weights = self.random.normal(size=shape) * size / np.sqrt(np.prod(shape[1:]))
        names = [source, self.constant(f"{output}_w", weights)]
        if bias:
            names.append(self.constant(f"{output}_b", self.random.normal(0, 0.3, outputs)))
        pad = kernel // 2
        return self.node("Conv", names, output, group=group, pads=[pad] * 4, strides=[stride] * 2)

    def model(self, outputs, *, opset=17, batch="N", channels=3, side=16, features=None):
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, channels, side, side])],
            [
                helper.make_tensor_value_info(
                    name, TensorProto.FLOAT, [batch, features] if features else [batch, *"chw"]
                )
                for name in outputs
            ],
            [numpy_helper.from_array(values, name) for name, values in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def sketch_net(*, opset=17, classifier=True, transposed=True):
    """A stem with hard-swish, a block with ReLU6, a gate and a residual sum, a head."""
    net = Sketch()
    net.conv("input", "stem", inputs=3, outputs=16, kernel=3)
    net.node("HardSigmoid", ["stem"], "stem_gate", alpha=1 / 6, beta=0.5)
    net.node("Mul", ["stem", "stem_gate"], "stem_act")
    net.conv("stem_act", "expand", inputs=16, outputs=32)
    net.constant("zero", 0)
    net.constant("six", 6)
    net.node("Clip", ["expand", "zero", "six"], "expand_act")
    net.conv("expand_act", "depth", inputs=32, outputs=32, kernel=3, group=32)
    net.node("Relu", ["depth"], "depth_act")
    net.node("GlobalAveragePool", ["depth_act"], "mean")
    net.conv("mean", "reduce", inputs=32, outputs=8)
    net.node("Relu", ["reduce"], "reduce_act")
    net.conv("reduce_act", "excite", inputs=8, outputs=32)
    net.node("HardSigmoid", ["excite"], "gate", alpha=1 / 6, beta=0.5)
    net.node("Mul", ["depth_act", "gate"], "gated")
    net.conv("gated", "project", inputs=32, outputs=16, bias=False)
    net.node("Add", ["project", "stem_act"], "sum")
    net.conv("sum", "head", inputs=16, outputs=24)
    net.node("Relu", ["head"], "head_act")
    net.node("GlobalAveragePool", ["head_act"], "pooled")
    if not classifier:
        net.node("Flatten", ["pooled"], "output")
        return net.model(["output"], opset=opset, features=24)
    net.node("Flatten", ["pooled"], "features")
    weights = net.random.normal(0, 0.4, (10, 24))
    net.constant("classes_w", weights if transposed else weights.T)
    net.constant("classes_b", net.random.normal(0, 0.3, 10))
    net.node("Gemm", ["features", "classes_w", "classes_b"], "output", transB=int(transposed))
    return net.model(["output"], opset=opset, features=10)


def images_of(count=16, side=16, seed=0):
    random = np.random.default_rng(seed)
    coarse = random.normal(size=(count, 3, side // 4, side // 4)).repeat(4, 2).repeat(4, 3)
    return (coarse + 0.3 * random.normal(size=(count, 3, side, side))).astype(np.float32)


def ranges_of(model, images=None):
    images = images_of() if images is None else images
    return calibrate(model, images, method="minmax")


def quantise_net(form, *, keep=(), **options):
    model = sketch_net(opset=19 if form == "int8-trt-fp16" else 17, **options)
    return quantise(model, form=form, ranges=ranges_of(model), keep=keep)


def run(model, images, *, plain=False):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"input": images})[0]


def optimised_kinds(model, path):
    """What ONNX Runtime runs: the kinds of nodes after its portable optimisations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path / "optimised.onnx").graph.node)


def maker(model, tensor):
    return next((node for node in model.graph.node if tensor in node.output), None)


def named(model, name):
    return next(node for node in model.graph.node if node.name == name)


def constants(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def kinds(model):
    return Counter(node.op_type for node in model.graph.node)


def pair_of(model, tensor):
    """Return what a dequantised tensor was before, and the two nodes it went through; None where it is none."""
    back = maker(model, tensor)
    if back is None or back.op_type != "DequantizeLinear":
        return None
    there = maker(model, back.input[0])
    return None if there is None else (there.input[0], there, back)


def cosine(found, expected):
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(1) / norms).mean())


# Scales --------------------------------------------------------------------------------------------------------------


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


# What TensorRT asks for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", TENSORRT_FORMS)
def test_all_zero_points_are_written_and_are_int8_zeros(form):
    model = quantise_net(form)
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
    model = quantise_net(form)
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
    model = quantise_net(form)
    assert named(model, "expand_Conv").input[2] == "expand_b"
    assert not any(values.dtype == np.int32 for values in constants(model).values())


def test_activations_have_one_pair_whoever_reads_them():
    model = quantise_net("int8-trt")
    there = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert Counter(node.input[0] for node in there).most_common(1)[0][1] == 1
    expand, total = named(model, "expand_Conv"), named(model, "sum_Add")
    assert expand.input[0] == total.input[1]
    assert pair_of(model, total.input[1])[0] == "stem_act"


def test_only_the_skip_input_of_a_residual_sum_has_a_pair():
    total = named(quantise_net("int8-trt"), "sum_Add")
    assert total.input[0] == "project"
    assert total.input[1] != "stem_act"


def test_outputs_are_not_quantised():
    model = quantise_net("int8-trt")
    quantised = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert not quantised & {"expand", "depth", "project", "head", "output", "sum_Add"}
    assert quantised >= {"stem_act", "expand_act", "gated", "sum"}


def test_of_two_convolutions_the_deeper_one_is_fused_with_the_sum():
    """A downsampling skip is a convolution too; the exporter may write it first or second."""
    for order in (["main", "short"], ["short", "main"]):
        net = Sketch()
        net.conv("input", "a", inputs=16, outputs=16)
        net.node("Relu", ["a"], "r")
        net.conv("r", "main", inputs=16, outputs=16)
        net.conv("input", "short", inputs=16, outputs=16)
        net.node("Add", order, "output")
        model = net.model(["output"], channels=16)
        images = np.random.default_rng(0).normal(size=(4, 16, 16, 16)).astype(np.float32)
        quantised = quantise(model, form="int8-trt", ranges=ranges_of(model, images))
        total = named(quantised, "output_Add")
        assert total.input[order.index("main")] == "main"
        assert pair_of(quantised, total.input[order.index("short")])[0] == "short"


def test_sum_behind_a_kept_convolution_keeps_its_skip():
    model = quantise_net("int8-trt", keep=["project_Conv"])
    assert list(named(model, "sum_Add").input) == ["project", "stem_act"]
    assert list(named(model, "project_Conv").input) == ["gated", "project_w"]


@pytest.mark.parametrize("opset", [13, 17])
def test_tensorrt_form_holds_at_old_opsets(opset):
    model = sketch_net(opset=opset)
    quantised = quantise(model, form="int8-trt", ranges=ranges_of(model))
    assert quantised.opset_import[0].version == opset
    onnx.checker.check_model(quantised, full_check=True)


# The half form --------------------------------------------------------------------------------------------------------


def test_half_form_is_half_inside_and_float32_outside():
    model = quantise_net("int8-trt-fp16")
    graph = model.graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {
        TensorProto.FLOAT
    }
    assert kinds(model)["Cast"] == 2
    assert {values.dtype for values in constants(model).values()} == {np.dtype(np.float16), np.dtype(np.int8)}


def test_half_form_is_near_the_float32_one():
    images = images_of(seed=1)
    found, expected = run(quantise_net("int8-trt-fp16"), images), run(quantise_net("int8-trt"), images)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_half_form_asks_for_opset_19():
    model = sketch_net(opset=17)
    with pytest.raises(TargetError, match=r"'int8-trt-fp16' needs opset 19, the graph has 17\n.*opset = 19"):
        quantise(model, form="int8-trt-fp16", ranges=ranges_of(model))


def overflowing_net():
    model = sketch_net(opset=19)
    for tensor in model.graph.initializer:
        if tensor.name in ("head_w", "head_b"):
            tensor.CopyFrom(numpy_helper.from_array(1e5 * numpy_helper.to_array(tensor), tensor.name))
        if tensor.name == "classes_w":
            tensor.CopyFrom(numpy_helper.from_array(1e-5 * numpy_helper.to_array(tensor), tensor.name))
    return model


def test_tensor_that_overflows_half_needs_images():
    model = overflowing_net()
    with pytest.raises(
        DataError, match=r"tensor '\w+' reaches [\d.e+]+, which fp16 may not hold\n.*give images"
    ):
        quantise(model, form="int8-trt-fp16", ranges=ranges_of(model))


def test_node_that_overflows_half_stays_in_float32_with_float32_scales():
    model, images = overflowing_net(), images_of(seed=1)
    quantised = quantise(model, form="int8-trt-fp16", ranges=ranges_of(model), images=images_of())
    head = named(quantised, "head_Conv")
    values = constants(quantised)
    for place in (0, 1):
        assert values[pair_of(quantised, head.input[place])[1].input[1]].dtype == np.float32
    assert values[pair_of(quantised, named(quantised, "depth_Conv").input[0])[1].input[1]].dtype == np.float16
    found, expected = run(quantised, images), run(model, images)
    assert np.isfinite(found).all()
    assert cosine(found, expected) > 0.97


# What ONNX Runtime asks for --------------------------------------------------------------------------------------------


def test_every_operator_but_the_first_convolution_becomes_an_integer_kernel(tmp_path):
    found = optimised_kinds(quantise_net("int8-cpu"), tmp_path)
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
    model = quantise_net("int8-cpu")
    values = constants(model)
    depth = named(model, "depth_Conv")
    _, there, _ = pair_of(model, depth.input[0])
    assert values[there.input[2]].dtype == np.uint8
    codes, scale, zero = (values[name] for name in maker(model, depth.input[1]).input)
    assert (codes.dtype, scale.shape) == (np.int8, (32,))
    assert not zero.any()
    assert values[maker(model, depth.input[2]).input[0]].dtype == np.int32


def test_clips_that_saturation_computes_are_gone():
    model = quantise_net("int8-cpu")
    assert not kinds(model)["Clip"]
    assert not kinds(model)["Relu"]
    values = constants(model)
    there = pair_of(model, named(model, "depth_Conv").input[0])[1]
    assert values[there.input[2]] == 0


def test_relu_at_the_end_of_the_net_stays():
    net = Sketch()
    net.conv("input", "a", inputs=16, outputs=16)
    net.node("Relu", ["a"], "output")
    model = net.model(["output"], channels=16)
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 16)).astype(np.float32)
    found = run(quantise(model, form="int8-cpu", ranges=ranges_of(model, images)), images)
    assert found.min() == 0
    assert np.abs(found - run(model, images)).max() < 0.05 * found.max()


def test_clip_that_ends_below_zero_stays():
    net = Sketch()
    net.conv("input", "a", inputs=16, outputs=16)
    net.constant("low", -1)
    net.constant("high", 1)
    net.node("Clip", ["a", "low", "high"], "c")
    net.conv("c", "output", inputs=16, outputs=16)
    model = net.model(["output"], channels=16)
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 16)).astype(np.float32)
    quantised = quantise(model, form="int8-cpu", ranges=ranges_of(model, images))
    assert kinds(quantised)["Clip"] == 1
    expected = run(model, images)
    assert np.abs(run(quantised, images) - expected).max() < 0.05 * np.abs(expected).max()


def test_output_of_the_net_is_not_rounded():
    for classifier in (True, False):
        found = run(quantise_net("int8-cpu", classifier=classifier), images_of())
        assert len(np.unique(found)) > 0.5 * found.size


def test_hard_sigmoid_as_an_integer_sum_is_the_hard_sigmoid():
    net = Sketch()
    net.conv("input", "a", inputs=16, outputs=16)
    net.node("HardSigmoid", ["a"], "g", alpha=0.2, beta=0.4)
    net.node("Mul", ["a", "g"], "h")
    net.conv("h", "output", inputs=16, outputs=16)
    model = net.model(["output"], channels=16)
    images = 4 * np.random.default_rng(0).normal(size=(8, 16, 16, 16)).astype(np.float32)
    quantised = quantise(model, form="int8-cpu", ranges=ranges_of(model, images))
    assert not kinds(quantised)["HardSigmoid"]
    exposed = onnx.ModelProto()
    exposed.CopyFrom(quantised)
    gate = named(quantised, "h_Mul").input[1]
    exposed.graph.output.insert(0, helper.make_empty_tensor_value_info(gate))
    source = next(name for name in named(quantised, "h_Mul").input if name != gate)
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
    model = portable(net.model(["output"], channels=16), opset=17, hard_swish=hard_swish)
    images = 4 * np.random.default_rng(0).normal(size=(8, 16, 16, 16)).astype(np.float32)
    found = {
        form: quantise(model, form=form, ranges=ranges_of(model, images)) for form in ("int8-cpu", "int8-trt")
    }
    fused = optimised_kinds(found["int8-cpu"], tmp_path)
    assert not {"Clip", "HardSigmoid", "HardSwish", "Mul", "Add"} & set(fused)
    expected = run(model, images)
    for quantised in found.values():
        assert np.abs(run(quantised, images) - expected).max() < 0.05 * np.abs(expected).max()


def test_bias_far_larger_than_its_weights_survives():
    net = Sketch()
    net.conv("input", "a", inputs=16, outputs=16)
    net.node("Relu", ["a"], "r")
    net.conv("r", "output", inputs=16, outputs=16)
    net.constants["a_w"][3] = 0
    net.constants["a_w"][5] *= 1e-12
    net.constants["a_b"][:] = 2.5
    model = net.model(["output"], channels=16)
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 16)).astype(np.float32)
    ranges = ranges_of(model, images)
    quantised = quantise(model, form="int8-cpu", ranges=ranges)
    values = constants(quantised)
    codes, scale, _ = (values[name] for name in maker(quantised, named(quantised, "a_Conv").input[2]).input)
    np.testing.assert_allclose(codes * scale.astype(np.float64), net.constants["a_b"], rtol=1e-4, atol=1e-3)
    expected = run(model, images)
    assert np.abs(run(quantised, images) - expected).max() < 0.05 * np.abs(expected).max()


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
    model = net.model(["output"], channels=16)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 16)).astype(np.float32)
    ranges = {"input": (-2.0, 3.0), "output": (0.0, 2.0)}
    found = run(quantise(model, form=form, ranges=ranges), images, plain=True)
    weights, bias = net.constants["a_w"], net.constants["a_b"]
    w_scale = (np.abs(weights).max(axis=(1, 2, 3)) / 127).reshape(-1, 1, 1, 1)
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
def test_quantised_net_is_near_the_float_one(form):
    model, images = sketch_net(), images_of(64, seed=1)
    expected = run(model, images)
    found = run(quantise_net(form), images)
    assert cosine(found, expected) > 0.995
    assert np.abs(found - expected).max() > 1e-4


@pytest.mark.parametrize("form", ["int8-trt", "int8-cpu"])
@pytest.mark.parametrize("transposed", [True, False])
def test_classifier_is_quantised_per_class(form, transposed):
    """For TensorRT only where it is asked to: the classifier is kept by default."""
    model = sketch_net(transposed=transposed)
    quantised = quantise(model, form=form, ranges=ranges_of(model))
    node = named(quantised, "output_Gemm")
    if form == "int8-trt":
        assert list(node.input) == ["features", "classes_w", "classes_b"]
        return
    back = maker(quantised, node.input[1])
    assert helper.get_node_attr_value(back, "axis") == (0 if transposed else 1)
    assert constants(quantised)[back.input[1]].shape == (10,)


# What is kept ----------------------------------------------------------------------------------------------------------


def test_groups_are_found_by_structure():
    assert default_keep(sketch_net()) == {
        "squeeze_excite": ["reduce_Conv", "reduce_act_Relu", "excite_Conv", "gate_HardSigmoid"],
        "first_conv": ["stem_Conv"],
        "classifier": ["output_Gemm"],
    }


def test_pool_before_the_head_is_no_squeeze_and_excitation():
    assert default_keep(sketch_net(classifier=False))["classifier"] == []
    groups = default_keep(sketch_net())
    assert "head_Conv" not in {name for names in groups.values() for name in names}


def test_baseline_is_disjoint_from_what_is_quantised():
    model = sketch_net()
    assert baseline_keep(model, "int8-cpu") == ["stem_Conv"]
    assert quantisable(model, "int8-cpu") == [
        "expand_Conv", "depth_Conv", "reduce_Conv", "excite_Conv", "project_Conv", "head_Conv", "output_Gemm",
    ]  # fmt: skip
    for form in TENSORRT_FORMS:
        assert quantisable(model, form) == ["expand_Conv", "depth_Conv", "project_Conv", "head_Conv"]
        assert {"stem_Conv", "output_Gemm", "reduce_Conv", "excite_Conv"} <= set(baseline_keep(model, form))


@pytest.mark.parametrize("form", FORMS)
def test_kept_nodes_compute_in_floats(form):
    kept = ["depth_Conv", "head_Conv"]
    model = quantise_net(form, keep=kept)
    values = constants(model)
    for name in kept:
        assert named(model, name).input[1] in values
        assert values[named(model, name).input[1]].dtype in (np.float32, np.float16)
    assert pair_of(model, named(model, "expand_Conv").input[0]) is not None


def test_keeping_more_comes_nearer_to_float():
    model, images = sketch_net(), images_of(64, seed=1)
    expected, ranges = run(model, images), ranges_of(sketch_net())
    for form in ("int8-trt", "int8-cpu"):
        names = quantisable(model, form)
        errors = [
            np.abs(
                run(quantise(model, form=form, ranges=ranges, keep=names[:count]), images) - expected
            ).mean()
            for count in (0, len(names))
        ]
        assert errors[1] < 1e-5 < errors[0], form


def test_unknown_name_to_keep_is_refused_with_a_near_one():
    with pytest.raises(TargetError, match=r"no node 'depth_Con' to keep.*\n.*did you mean 'depth_Conv'"):
        quantise_net("int8-trt", keep=["depth_Con"])


def test_tensor_without_a_range_is_named():
    model = sketch_net()
    ranges = ranges_of(model)
    del ranges["gated"]
    for form in ("int8-trt", "int8-cpu"):
        with pytest.raises(DataError, match=r"tensor 'gated' has no range\n.*calibrate the very graph"):
            quantise(model, form=form, ranges=ranges)


@pytest.mark.parametrize("ends", [(0.0, float("inf")), (float("nan"), 1.0), (2.0, 1.0)])
def test_range_that_is_none_is_named(ends):
    model = sketch_net()
    with pytest.raises(DataError, match="tensor 'gated' has the range"):
        quantise(model, form="int8-trt", ranges={**ranges_of(model), "gated": ends})


# Graphs that are a little odd ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_tensor_and_channel_of_zeros_are_quantised(form):
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
    quantised = quantise(model, form=form, ranges=ranges)
    for node in quantised.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = constants(quantised)[node.input[1]]
            assert np.isfinite(scale).all()
            assert (scale > 0).all()
    assert cosine(run(quantised, images_of()), run(model, images_of())) > 0.99


@pytest.mark.parametrize("form", FORMS)
def test_weights_shared_by_a_quantised_and_a_kept_convolution_serve_both(form):
    net = Sketch()
    net.conv("input", "a", inputs=16, outputs=16, bias=False)
    net.node("Relu", ["a"], "r")
    net.node("Conv", ["r", "a_w"], "b")
    net.node("Relu", ["b"], "s")
    net.node("Conv", ["s", "a_w"], "output")
    model = net.model(["output"], opset=19, channels=16)
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 16)).astype(np.float32)
    quantised = quantise(model, form=form, ranges=ranges_of(model, images), keep=["b_Conv"])
    assert named(quantised, "b_Conv").input[1] == "a_w"
    assert named(quantised, "a_Conv").input[1] != "a_w"
    expected = run(model, images)
    assert np.abs(run(quantised, images) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("form", FORMS)
def test_any_batch_is_taken(form):
    model = quantise_net(form)
    whole = run(model, images_of(5))
    assert whole.shape == (5, 10)
    np.testing.assert_allclose(run(model, images_of(5)[:1]), whole[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_same_bytes_each_time_and_the_source_untouched(form):
    model = sketch_net(opset=19)
    before = model.SerializeToString()
    ranges = ranges_of(model)
    first, second = (quantise(model, form=form, ranges=ranges).SerializeToString() for _ in range(2))
    assert first == second
    assert model.SerializeToString() == before


@pytest.mark.parametrize("form", FORMS)
def test_metadata_of_the_model_is_handed_on(form):
    model = sketch_net(opset=19)
    entry = model.metadata_props.add()
    entry.key, entry.value = "edgecl.mean", "[0.5]"
    quantised = quantise(model, form=form, ranges=ranges_of(model))
    assert [(entry.key, entry.value) for entry in quantised.metadata_props] == [("edgecl.mean", "[0.5]")]


# Real nets, and the runtimes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported():
    """Nets of the support list at 64 pixels, their batch norms settled, with ranges from the same kind of images."""
    made = {}

    def make(arch):
        if arch not in made:
            torch.manual_seed(0)
            net = create_backbone(arch, num_classes=10)
            images = images_of(16, SIDE)
            for module in net.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 0.5
            with torch.no_grad():
                for _ in range(2):
                    net.train()(torch.from_numpy(images))
            model = onnx_from_net(
                net.eval(),
                graph=Graph(opset=19, dynamic_batch=True, max_batch=16),
                shape=(3, SIDE, SIDE),
                metadata={},
            )
            made[arch] = model, ranges_of(model, images)
        return made[arch]

    return make


@pytest.fixture(scope="module")
def tensorrt_log():
    """The one logger a process can have: TensorRT ignores any later one."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    return trt, trt.Logger(trt.Logger.ERROR)


def build(tensorrt_log, model):
    """Parse and compile; return the parser's errors, the kinds of layers and the plan."""
    trt, log = tensorrt_log
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    parser.parse(model.SerializeToString())
    errors = [parser.get_error(place).desc() for place in range(parser.num_errors)]
    if errors:
        return errors, None, None
    settings = builder.create_builder_config()
    settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 28)
    source = network.get_input(0)
    sides = list(source.shape)[1:]
    if source.shape[0] == -1:
        profile = builder.create_optimization_profile()
        profile.set_shape(source.name, [1, *sides], [1, *sides], [4, *sides])
        settings.add_optimization_profile(profile)
    layers = Counter(network.get_layer(place).type.name for place in range(network.num_layers))
    return errors, layers, builder.build_serialized_network(network, settings)


@pytest.mark.parametrize("form", TENSORRT_FORMS)
@pytest.mark.parametrize("arch", NETS)
def test_tensorrt_compiles_each_net(exported, tensorrt_log, arch, form):
    model, ranges = exported(arch)
    quantised = quantise(model, form=form, ranges=ranges)
    errors, layers, plan = build(tensorrt_log, quantised)
    assert errors == []
    found = kinds(quantised)
    assert layers["CONVOLUTION"] == kinds(model)["Conv"]
    assert layers["QUANTIZE"] == layers["DEQUANTIZE"] == found["QuantizeLinear"]
    # A dynamic batch brings one along.
    assert layers["CAST"] - (2 if form == "int8-trt-fp16" else 0) in (0, 1)
    assert plan is not None
    assert plan.nbytes > 1_000_000


@pytest.mark.parametrize("opset", [13, 17])
def test_tensorrt_compiles_old_opsets(tensorrt_log, opset):
    model = sketch_net(opset=opset)
    errors, layers, plan = build(tensorrt_log, quantise(model, form="int8-trt", ranges=ranges_of(model)))
    assert (errors, layers["CONVOLUTION"]) == ([], 7)
    assert plan is not None


def test_tensorrt_refuses_the_form_for_processors(tensorrt_log):
    errors, _, _ = build(tensorrt_log, quantise_net("int8-cpu"))
    assert errors
    assert "zero point" in errors[0]


def test_tensorrt_refuses_a_zero_point_that_is_not_zero(tensorrt_log):
    """The control: the test above would notice a wrong graph."""
    model = quantise_net("int8-trt")
    for tensor in model.graph.initializer:
        if tensor.name == "stem_act_zero_point":
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(3, np.int8), tensor.name))
    errors, _, _ = build(tensorrt_log, model)
    assert "Non-zero zero point is not supported" in errors[0]


def test_tensorrt_refuses_an_int32_bias(tensorrt_log):
    model = quantise_net("int8-trt")
    node = named(model, "expand_Conv")
    node.input[2] = "bias_back"
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.ones(32, np.int32), "bias_codes"),
            numpy_helper.from_array(np.float32(0.01), "bias_scale"),
        ]
    )
    back = helper.make_node("DequantizeLinear", ["bias_codes", "bias_scale"], ["bias_back"], name="bias_back")
    model.graph.node.insert(0, back)
    errors, _, _ = build(tensorrt_log, model)
    assert "Int32" in errors[0]


# Of the first block: stem and depthwise; with the pointwise that a residual sum goes around; with a gate's two.
IN_FLOAT = {"mobilenetv1_100": 2, "mobilenetv3_large_100": 3, "efficientnet_b0": 4}


@pytest.mark.parametrize("arch", NETS)
def test_onnx_runtime_fuses_each_net_completely(exported, arch, tmp_path):
    model, ranges = exported(arch)
    found = optimised_kinds(quantise(model, form="int8-cpu", ranges=ranges), tmp_path)
    assert found["QLinearConv"] == kinds(model)["Conv"] - IN_FLOAT[arch]
    assert (found["QGemm"], found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1, 0)
    # What is left in float belongs to the first block.
    first = {node.op_type for node in model.graph.node if node.name in first_block(model)}
    assert {"Clip", "Relu", "HardSigmoid", "Sigmoid", "Mul", "Add", "Gemm"} & set(found) <= first


def test_first_block_ends_before_the_first_pointwise_convolution(exported):
    model, _ = exported("mobilenetv1_100")
    names = set(first_block(model))
    weighted = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [node.name in names for node in weighted[:4]] == [True, True, False, False]


def test_first_block_with_a_residual_sum_ends_behind_it(exported):
    model, _ = exported("mobilenetv3_large_100")
    names = set(first_block(model))
    weighted = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [node.name in names for node in weighted[:5]] == [True, True, True, False, False]
    assert sum(node.op_type == "Add" and node.name in names for node in model.graph.node) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", NETS)
def test_each_net_stays_near_fp32(exported, arch, form):
    model, ranges = exported(arch)
    images = images_of(8, SIDE, seed=2)
    found = run(quantise(model, form=form, ranges=ranges), images)
    assert cosine(found, run(model, images)) > 0.9


def test_squeeze_and_excitation_of_mobilenet_v3_is_found(exported):
    model, _ = exported("mobilenetv3_large_100")
    groups = default_keep(model)
    found = Counter(named(model, name).op_type for name in groups["squeeze_excite"])
    assert found == {"Conv": 16, "Relu": 8, "HardSigmoid": 8}
    weights = {named(model, name).input[1] for name in groups["squeeze_excite"] if "Conv" in name}
    assert all(".se.conv_" in name for name in weights)
    assert named(model, groups["first_conv"][0]).input[1] == "conv_stem.weight"
    assert named(model, groups["classifier"][0]).input[1] == "classifier.weight"
