"""A small net with all that matters to INT8, written by hand, and ways to look into a graph."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgecl.deploy.calibrate import calibrate
from edgecl.deploy.int8 import quantize as quantize_for

FORMS = ("int8-trt", "int8-trt-fp16", "int8-cpu")
TENSORRT_FORMS = ("int8-trt", "int8-trt-fp16")
# Of the pictures of real nets.
SIDE = 64


def model_of(nodes, constants, *, shape, out, ends=("input", "output"), opset=17):
    """A float32 model of hand-written nodes; those without a name get one."""
    for node in nodes:
        node.name = node.name or f"{node.op_type}_{node.output[0]}"
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sides)
        for name, sides in zip(ends, (shape, out), strict=True)
    ]
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


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

    def model(self, *, opset=17, channels=3, side=16, features=None):
        out = ["N", features] if features else ["N", *"chw"]
        return model_of(self.nodes, self.constants, shape=["N", channels, side, side], out=out, opset=opset)


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
        return net.model(opset=opset, features=24)
    net.node("Flatten", ["pooled"], "features")
    weights = net.random.normal(0, 0.4, (10, 24))
    net.constant("classes_w", weights if transposed else weights.T)
    net.constant("classes_b", net.random.normal(0, 0.3, 10))
    net.node("Gemm", ["features", "classes_w", "classes_b"], "output", transB=int(transposed))
    return net.model(opset=opset, features=10)


def images_of(count=16, side=16, seed=0):
    random = np.random.default_rng(seed)
    coarse = random.normal(size=(count, 3, side // 4, side // 4)).repeat(4, 2).repeat(4, 3)
    return (coarse + 0.3 * random.normal(size=(count, 3, side, side))).astype(np.float32)


def ranges_of(model, images=None):
    images = images_of() if images is None else images
    return calibrate(model, images, ["minmax"])["minmax"]


def quantize(model, **options):
    """With images of nothing for the half form, which then looks at the weights alone."""
    sides = [side.dim_value or 1 for side in model.graph.input[0].type.tensor_type.shape.dim]
    return quantize_for(model, **{"images": np.zeros(sides, np.float32), **options})


def quantize_net(form, *, keep=(), **options):
    model = sketch_net(opset=19 if form == "int8-trt-fp16" else 17, **options)
    return quantize(model, form=form, ranges=ranges_of(model), keep=keep)


def run(model, images, *, plain=False):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def relative(found, expected):
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6)


def optimized_kinds(model, path):
    """What ONNX Runtime runs: the kinds of nodes after its portable optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path / "optimized.onnx").graph.node)


def maker(model, tensor):
    return next((node for node in model.graph.node if tensor in node.output), None)


def named(model, name):
    return next(node for node in model.graph.node if node.name == name)


def constants(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def kinds(model):
    return Counter(node.op_type for node in model.graph.node)


def pair_of(model, tensor):
    """Return what a dequantized tensor was before, and the two nodes it went through; None where it is none."""
    back = maker(model, tensor)
    if back is None or back.op_type != "DequantizeLinear":
        return None
    there = maker(model, back.input[0])
    return None if there is None else (there.input[0], there, back)


def cosine(found, expected):
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(1) / norms).mean())
