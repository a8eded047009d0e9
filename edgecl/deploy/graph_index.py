"""What the nodes of a net stand for: its first and last layers, gates, residual sums, and what can be quantized.

onnx_ir has producers and uses of a value as well; going there from protocol buffers and back would take more lines than
`GraphIndex` has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import onnx
from onnx import helper, numpy_helper

from edgecl.config.target import Int8Form

WEIGHTED = ("Conv", "Gemm", "MatMul")
_POOLS = ("GlobalAveragePool", "ReduceMean")


def quantizable(model: onnx.ModelProto, form: Int8Form) -> list[str]:
    """Return the names of the convolutions and matrix products that a form quantizes, in the graph's order.

    Sums, products, pools and activations follow from them: they are quantized where their inputs are.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    kept = set(baseline_keep(model, form))
    return [
        node.name
        for node in model.graph.node
        if node.name not in kept
        and node.op_type in WEIGHTED
        and constants.issuperset(filter(None, node.input[1:]))
    ]


def baseline_keep(model: onnx.ModelProto, form: Int8Form) -> list[str]:
    """Return the names of the nodes that stay in higher precision whatever the accuracy is.

    For TensorRT the branches of squeeze-and-excitation and the classifier, products of a matrix and one vector that cost
    next to nothing, and convolutions too narrow for the integer kernels. For ONNX Runtime the first convolution, when
    it reads an image of few channels: it is faster in float32 than in integers, and better; what it makes is
    quantized. A branch of squeeze-and-excitation in float32 would be slower there than one in integers, because of the
    changes of layout and type at either end; only that of the first block stays float, see `first_block`.

    Source: the exclusions of NVIDIA's Model Optimizer, for TensorRT.
    """
    groups = default_keep(model)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    if form == "int8-cpu":
        first = [node for node in model.graph.node if node.name in groups["first_conv"]]
        kept = {node.name for node in first if 0 < input_channels(node, shapes) < 8} | set(first_block(model))
    else:
        kept = {*groups["squeeze_excite"], *groups["classifier"]}
        kept |= {
            node.name for node in model.graph.node if node.op_type == "Conv" and _is_narrow(node, shapes)
        }
    return [node.name for node in model.graph.node if node.name in kept]


def first_block(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes before the second pointwise stage of a net that begins stem, depthwise, pointwise.

    These read the largest maps and do little with each value, so that on a CPU they gain less from integers than
    going there costs. The block ends before its pointwise convolution, or, where a residual sum goes around
    both, behind that sum.
    """
    groups, links = default_keep(model), GraphIndex(model.graph)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    aside = {*groups["first_conv"], *groups["squeeze_excite"]}
    rest = [node for node in model.graph.node if node.op_type in WEIGHTED and node.name not in aside]
    if len(rest) < 3 or len(groups["first_conv"]) != 1 or rest[0].op_type != "Conv":
        return []
    channels = input_channels(rest[0], shapes)
    if channels < 2 or attribute(rest[0], "group", 1) != channels:
        return []
    has_skip = any(node.op_type == "Add" for node in links.readers[rest[0].input[0]])
    end = rest[2 if has_skip else 1].name
    names = [node.name for node in model.graph.node]
    return names[: names.index(end)]


def default_keep(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Find the parts of a net that are known to lose most in INT8 and to cost least outside it.

    Returns:
        "squeeze_excite": every node between a global pool and the product that its gate scales, both excluded;
        "first_conv": the convolutions that no other comes before; "classifier": the matrix products that no other
        weighted node comes after.
    """
    links = GraphIndex(model.graph)
    weighted = [node for node in model.graph.node if node.op_type in WEIGHTED]
    after: set[str] = set()
    for node in model.graph.node:
        if node.op_type in WEIGHTED or any(name in after for name in node.input):
            after.update(node.output)
    before: set[str] = set()
    for node in reversed(model.graph.node):
        if node.op_type in WEIGHTED or any(name in before for name in node.output):
            before.update(node.input)
    excite = {node.name for node in links.squeeze_excite()}
    return {
        "squeeze_excite": [node.name for node in model.graph.node if node.name in excite],
        "first_conv": [
            node.name for node in weighted if node.op_type == "Conv" and node.input[0] not in after
        ],
        "classifier": [
            node.name for node in weighted if node.op_type == "Gemm" and node.output[0] not in before
        ],
    }


def clips_at_zero(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Return whether a node cuts at 0 and perhaps at an upper bound, as saturation at a calibrated range does."""
    if node.op_type == "Relu":
        return True
    least = constants.get(node.input[1]) if node.op_type == "Clip" and len(node.input) > 1 else None
    return least is not None and float(numpy_helper.to_array(least)) == 0.0


class GraphIndex:
    """Who makes and who reads each tensor of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.maker = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.readers[name].append(node)
        self._depth: dict[str, int] = {}
        for node in graph.node:
            depth = 1 + max((self._depth.get(name, 0) for name in node.input), default=0)
            self._depth.update(dict.fromkeys(node.output, depth))

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """Return the inputs of a node that are not constants."""
        return [name for name in node.input if name and name not in self.constants]

    def squeeze_excite(self) -> list[onnx.NodeProto]:
        """Return the nodes of every branch from a global pool of x to what x is multiplied with."""
        found: list[onnx.NodeProto] = []
        for pool in self.graph.node:
            if pool.op_type not in _POOLS:
                continue
            for product in self.readers[pool.input[0]]:
                gates = [name for name in self.activations(product) if name != pool.input[0]]
                if product.op_type == "Mul" and len(gates) == 1:
                    found += self._between(pool, gates[0])
        return found

    def _between(self, pool: onnx.NodeProto, gate: str) -> list[onnx.NodeProto]:
        """Return the nodes from a pool to a tensor; none where the tensor depends on anything else."""
        found: dict[str, onnx.NodeProto] = {}
        reached, open_ends = False, [gate]
        while open_ends:
            name = open_ends.pop()
            if name in pool.output:
                reached = True
                continue
            maker = self.maker.get(name)
            if maker is None or name == pool.input[0]:
                return []
            if maker.output[0] not in found:
                found[maker.output[0]] = maker
                open_ends += self.activations(maker)
        return list(found.values()) if reached else []

    def skip_input(self, node: onnx.NodeProto, quantized: Collection[str]) -> int | None:
        """Return which input of a residual sum is the skip: not the one that the deepest convolution makes for it alone.

        None where the sum is none, or that convolution is not quantized: the sum is fused into nothing then.
        """
        if node.op_type != "Add" or len(self.activations(node)) != 2 or node.input[0] == node.input[1]:
            return None
        sides = [
            side
            for side, name in enumerate(node.input)
            if name in self.maker
            and self.maker[name].op_type == "Conv"
            and len(self.readers[name]) == 1
            and name not in self.outputs
        ]
        if not sides:
            return None
        fused = max(sides, key=lambda side: self._depth[node.input[side]])
        return 1 - fused if self.maker[node.input[fused]].name in quantized else None


def _is_narrow(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Return whether a convolution has too few channels for TensorRT's integer kernels."""
    inputs = input_channels(node, shapes)
    if not inputs:
        return False
    outputs, per_group, *kernel = shapes[node.input[1]]
    if inputs > 1 and per_group == 1:
        return min(kernel) < 3
    if min(inputs, outputs) >= 16:
        return False
    return not (inputs % 8 == 0 and outputs % 8 == 0 and len(set(kernel)) == 1)


def input_channels(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]]) -> int:
    """Return how many channels a convolution reads; 0 where its weights are computed."""
    return shapes[node.input[1]][1] * int(attribute(node, "group", 1)) if node.input[1] in shapes else 0


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return a node's attribute, or its default."""
    return next(
        (helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default
    )
