"""float16: the same net but for rounding, and float32 exactly where float16 would overflow."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from edgecl.config.target import Graph
from edgecl.deploy.fp16 import half
from edgecl.deploy.onnx import onnx_from_net
from edgecl.nets.backbone import create_backbone

from . import sketch
from .sketch import kinds, model_of, relative

SIDE = 32


def to_onnx(net, **graph):
    return onnx_from_net(net, graph=Graph(**graph), shape=(3, SIDE, SIDE), metadata={"mean": [0.5]})


def run(model, seen):
    # Otherwise ONNX Runtime may drop a pair of Casts that TensorRT would carry out.
    return sketch.run(model, seen, plain=True)


class Scaled(nn.Module):
    """Two convolutions between which everything is `scale` times larger, with no effect on the result."""

    def __init__(self, scale):
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)
        self.down, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        with torch.no_grad():
            self.up.weight.mul_(scale)
            self.up.bias.mul_(scale)
            self.down.weight.div_(scale)

    def forward(self, x):
        x = self.down(self.up(torch.relu(self.stem(x))))
        return self.last(torch.relu(x).mean((2, 3)))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return to_onnx(create_backbone("mobilenetv3_small_100", num_classes=5).eval(), opset=17, batch=2)


@pytest.fixture(scope="module")
def scaled():
    torch.manual_seed(0)
    return to_onnx(Scaled(1e5).eval(), opset=17, batch=2, dynamic_batch=True)


def images(count):
    return np.random.default_rng(count).normal(size=(count, 3, SIDE, SIDE)).astype(np.float32)


def plain(model):
    """The conversion that ships with ONNX Runtime, made by others."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = deepcopy(model)
    converted = convert_float_to_float16(copy, keep_io_types=True)
    # It leaves the Cast of the input at the end of the file.
    nodes = sorted(converted.graph.node, key=lambda node: not node.name.startswith("graph_input_cast"))
    del converted.graph.node[:]
    converted.graph.node.extend(nodes)
    return converted


def types_of(model):
    return {
        value.name: value.type.tensor_type.elem_type
        for values in (model.graph.input, model.graph.value_info, model.graph.output)
        for value in values
    }


def test_result_is_that_of_onnx_runtimes_own_conversion(small):
    seen = images(2)
    converted, _ = half(small, images=seen)
    np.testing.assert_allclose(run(converted, seen), run(plain(small), seen), rtol=0, atol=2e-4)


def test_casts_stand_only_at_the_input_and_the_output(small):
    converted, about = half(small, images=images(2))
    assert kinds(converted) == {**kinds(small), "Cast": 2}
    assert about["kept_fp32"] == []
    assert [converted.graph.node[index].op_type for index in (0, -1)] == ["Cast", "Cast"]


def test_input_and_output_stay_float32_and_everything_between_is_float16(small):
    converted, _ = half(small, images=images(2))
    types = types_of(converted)
    assert (types.pop("input"), types.pop("output")) == (TensorProto.FLOAT, TensorProto.FLOAT)
    assert set(types.values()) == {TensorProto.FLOAT16}
    assert {tensor.data_type for tensor in converted.graph.initializer} == {TensorProto.FLOAT16}
    assert len(converted.SerializeToString()) < 0.55 * len(small.SerializeToString())


def test_file_is_sound_and_says_what_it_said(small):
    converted, _ = half(small, images=images(2))
    onnx.checker.check_model(converted, full_check=True)
    assert converted.opset_import == small.opset_import
    assert converted.ir_version == small.ir_version
    assert converted.metadata_props == small.metadata_props
    assert {node.name for node in small.graph.node} < {node.name for node in converted.graph.node}
    assert {node.output[0] for node in small.graph.node} < set(types_of(converted))


def run_in_float16(model, seen):
    """Run by ONNX's own definition; ONNX Runtime computes float16 in float32 where the CPU has no other way."""
    with np.errstate(over="ignore", invalid="ignore"):
        return ReferenceEvaluator(model).run(None, {"input": seen})[0]


def test_plain_conversion_overflows_and_ours_does_not(scaled):
    seen = 10 * images(2)
    expected = run(scaled, seen)
    assert not np.isfinite(run_in_float16(plain(scaled), seen)).all(), "no overflow: the test shows nothing"
    converted, about = half(scaled, images=seen)
    assert relative(run_in_float16(converted, seen), expected) < 1e-2
    assert relative(run(converted, seen), expected) < 1e-2
    assert about["largest"] > 65504


def test_just_the_nodes_around_the_large_tensor_stay_float32(scaled):
    converted, about = half(scaled, images=10 * images(3))
    up, down = [node for node in scaled.graph.node if node.op_type == "Conv"][1:]
    assert about["kept_fp32"] == [up.name, down.name]
    # In, to the first of them, from the second, out; none between the two, where float16 would overflow.
    assert kinds(converted)["Cast"] == 4
    types = types_of(converted)
    assert types[up.output[0]] == TensorProto.FLOAT
    reader = next(node for node in converted.graph.node if node.name == down.name)
    assert reader.input[0] == up.output[0]
    weights = {tensor.name: tensor.data_type for tensor in converted.graph.initializer}
    assert weights[up.input[1]] == weights[down.input[1]] == TensorProto.FLOAT
    assert list(weights.values()).count(TensorProto.FLOAT16) == 4
    onnx.checker.check_model(converted, full_check=True)


def test_largest_magnitude_is_that_of_any_image(scaled):
    seen = images(6)
    seen[5] *= 100
    _, about = half(scaled, images=seen)
    with torch.no_grad():
        torch.manual_seed(0)
        net = Scaled(1e5)
        expected = net.up(torch.relu(net.stem(torch.from_numpy(seen)))).abs().max().item()
    assert about["largest"] == pytest.approx(expected, rel=1e-4)


def hand(nodes, weights):
    weights = {name: np.asarray(array, np.float32) for name, array in weights.items()}
    return model_of(nodes, weights, shape=("N", 4), out=("N", 4), ends="xy")


def test_weight_beyond_float16_keeps_its_reader_in_float32():
    nodes = [helper.make_node("Mul", ["x", "tiny"], ["a"]), helper.make_node("Mul", ["a", "huge"], ["y"])]
    model = hand(nodes, {"tiny": [1e-3], "huge": [1e5]})
    seen = np.array([[1, 2, 3, -4]], np.float32)
    converted, about = half(model, images=seen)
    assert about["kept_fp32"] == ["Mul_y"]
    np.testing.assert_allclose(run(converted, seen), seen * 100, rtol=1e-3)


def test_weight_that_both_kinds_read_is_there_twice():
    nodes = [
        helper.make_node("Mul", ["x", "shared"], ["a"]),
        helper.make_node("Mul", ["a", "huge"], ["b"]),
        helper.make_node("Mul", ["b", "shared"], ["c"]),
        helper.make_node("Div", ["c", "huge"], ["d"]),
        helper.make_node("Mul", ["d", "shared"], ["y"]),
    ]
    model = hand(nodes, {"shared": [1.5], "huge": [1e5]})
    seen = np.array([[1, 2, 3, -4]], np.float32)
    converted, about = half(model, images=seen)
    assert about["kept_fp32"] == ["Mul_b", "Mul_c", "Div_d"]
    assert {tensor.name for tensor in converted.graph.initializer} == {"shared", "huge", "shared_fp16"}
    np.testing.assert_allclose(run(converted, seen), seen * 1.5**3, rtol=1e-3)


def test_value_that_is_no_number_keeps_its_nodes_in_float32():
    nodes = [helper.make_node("Exp", ["x"], ["a"]), helper.make_node("Tanh", ["a"], ["y"])]
    converted, about = half(hand(nodes, {}), images=np.array([[100, 0, 0, 0]], np.float32))
    assert about["kept_fp32"] == ["Exp_a", "Tanh_y"]
    assert about["largest"] == 100
    assert "Cast" not in kinds(converted)


def test_input_beyond_float16_is_not_cast():
    nodes = [helper.make_node("Mul", ["x", "tiny"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    seen = np.array([[1e6, 2e6, -3e6, 0]], np.float32)
    converted, about = half(hand(nodes, {"tiny": [1e-6]}), images=seen)
    assert about["kept_fp32"] == ["Mul_a"]
    assert [node.op_type for node in converted.graph.node] == ["Mul", "Cast", "Relu", "Cast"]
    np.testing.assert_allclose(run(converted, seen), [[1, 2, 0, 0]], rtol=1e-3)


def test_output_that_is_read_inside_as_well_is_float32_outside_and_float16_inside():
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["z"])]
    model = hand(nodes, {})
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ("N", 4)))
    seen = np.array([[1, 2, -3, 0]], np.float32)
    converted, _ = half(model, images=seen)
    np.testing.assert_array_equal(run(converted, seen), [[1, 2, 0, 0]])
    assert [node.op_type for node in converted.graph.node] == ["Cast", "Relu", "Cast", "Neg", "Cast"]
