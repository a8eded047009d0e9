"""One portable ONNX graph from what torch exports: the opset and the operators that a runtime knows.

`onnx.version_converter` (onnx 1.23) does not do it: from opset 18 to 17 it leaves `noop_with_empty_axes` on ReduceMean,
which opset 17 refuses, and to 13 it has no adapter for HardSwish and Mul. Upwards it gives the same outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgecl.deploy.graph_index import attribute
from edgecl.errors import ParityError, TargetError

HardSwish = Literal["keep", "hard_sigmoid", "clip"]

IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10}
"""Opset -> the oldest file version that may carry it, which is what old runtimes still read."""

_AXES_AS_INPUT_FROM_18 = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)
# The exporter notes where in torch a tensor comes from; readers older than file version 10 have no such field.
_WITHOUT_METADATA = ("node", "initializer", "input", "output")

Shape = tuple[int | str, ...]


def portable(model: onnx.ModelProto, *, opset: int, hard_swish: HardSwish) -> onnx.ModelProto:
    """Rewrite an exported graph to an opset and to operators that TensorRT and ONNX Runtime take everywhere.

    A mean over height and width becomes GlobalAveragePool, a reshape to (N, F) becomes Flatten, hard-swish takes the
    form asked for. What remains is rewritten to the target's opset. Every tensor that both graphs have keeps its name.

    Args:
        model: a float32 graph of standard operators, with a static or a dynamic batch; it is left as it is.
        opset: 13 to 22, from an opset that is at least 18 or the same.
        hard_swish: "keep" as HardSwish (opset 14 and later), "hard_sigmoid" as HardSigmoid and Mul, or "clip" as
            Add, Clip, Mul, Mul; "clip" writes HardSigmoid as Add, Clip, Mul too, so that integers can carry it.

    Returns:
        a new model, checked, with shapes of all its tensors and the metadata of the old one.

    Raises:
        TargetError: the opset lacks an operator.
        ParityError: the rewritten graph does not pass ONNX's own check. An operator that means something else in that
            opset passes it; the outputs then differ from torch's, to which every exported graph is compared.
    """
    rewriter = _Rewriter(model, opset=opset, hard_swish=hard_swish)
    nodes = [written for node in model.graph.node for written in rewriter.rewrite(node)]
    return _assemble(model, nodes, rewriter.constants, opset=opset)


def opset_of(model: onnx.ModelProto) -> int:
    """Return the opset of a model's standard operators."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _shapes_of(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return the shape of every tensor of a graph that ONNX can infer; a dimension is a number or a name."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes: dict[str, Shape] = {
        tensor.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param
            for dim in tensor.type.tensor_type.shape.dim
        )
        for values in (graph.input, graph.value_info, graph.output)
        for tensor in values
        if tensor.type.tensor_type.HasField("shape")
    }
    shapes.update({tensor.name: tuple(tensor.dims) for tensor in graph.initializer})
    return shapes


class Names:
    """Names that neither a tensor nor a node of a graph has yet."""

    def __init__(self, graph: onnx.GraphProto):
        self._used = {tensor.name for values in (graph.input, graph.initializer) for tensor in values}
        for node in graph.node:
            self._used.update((node.name, *node.input, *node.output))

    def new(self, wish: str) -> str:
        """Return the wish, or the wish with the first number that makes it new."""
        name, number = wish, 1
        while name in self._used:
            number += 1
            name = f"{wish}_{number}"
        self._used.add(name)
        return name


class _Rewriter:
    """Rewrites each node to the target's opset and forms."""

    def __init__(self, model: onnx.ModelProto, *, opset: int, hard_swish: HardSwish):
        self._source = opset_of(model)
        self._target = opset
        self._hard_swish = hard_swish
        self._shapes = _shapes_of(model)
        self._names = Names(model.graph)
        self._scalars: dict[tuple[str, float], str] = {}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        """Those of the model and those that rewriting added."""
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants.setdefault(node.output[0], node.attribute[0].t)

    def rewrite(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Yield the nodes that compute what one node computed."""
        # Constants of the old graph are initializers of the new one, if anything still reads them.
        if node.op_type == "Constant" and node.output[0] in self.constants:
            return
        if node.op_type == "ReduceMean" and self._is_spatial_mean(node):
            yield from self._pool(node)
        elif node.op_type == "Reshape" and self._is_flatten(node):
            yield self._node("Flatten", [node.input[0]], node.output[0], name=node.name, axis=1)
        elif node.op_type == "HardSwish" and self._hard_swish != "keep":
            yield from self._write_hard_swish(node)
        elif node.op_type == "HardSigmoid" and self._hard_swish == "clip":
            alpha, beta = float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))
            yield from self._clipped(node.input[0], node.output[0], alpha=alpha, beta=beta, name=node.name)
        elif node.op_type == "LayerNormalization" and self._target < 17 and self._is_over_last(node):
            yield from self._write_layer_norm(node)
        elif node.op_type == "Shape" and self._target < 15 and node.attribute:
            yield from self._write_part_of_shape(node)
        else:
            yield self._restate(node)

    def _is_spatial_mean(self, node: onnx.NodeProto) -> bool:
        axes = self._axes(node)
        return len(self._shapes.get(node.input[0], ())) == 4 and {axis % 4 for axis in axes} == {2, 3}

    def _pool(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        if attribute(node, "keepdims", 1):
            yield self._node("GlobalAveragePool", [node.input[0]], node.output[0], name=node.name)
            return
        pooled = self._names.new(f"{node.output[0]}_pooled")
        yield self._node("GlobalAveragePool", [node.input[0]], pooled, name=node.name)
        yield self._node("Flatten", [pooled], node.output[0], axis=1)

    def _is_flatten(self, node: onnx.NodeProto) -> bool:
        """Return whether a reshape keeps the first dimension and joins all others."""
        old, new = (self._shapes.get(name, ()) for name in (node.input[0], node.output[0]))
        if len(new) != 2 or len(old) < 2 or not all(isinstance(side, int) and side > 0 for side in old[1:]):
            return False
        # With the product of the other dimensions as second dimension the first cannot be anything but N.
        return new[1] == math.prod(side for side in old[1:] if isinstance(side, int))

    def _write_hard_swish(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        source, result = node.input[0], node.output[0]
        gate = self._names.new(f"{result}_gate")
        if self._hard_swish == "hard_sigmoid":
            yield self._node("HardSigmoid", [source], gate, alpha=1 / 6, beta=0.5)
        else:
            yield from self._clipped(source, gate, alpha=1 / 6, beta=0.5)
        yield self._node("Mul", [source, gate], result, name=node.name)

    def _clipped(
        self, source: str, result: str, *, alpha: float, beta: float, name: str = ""
    ) -> Iterator[onnx.NodeProto]:
        """Yield clip(alpha x + beta, 0, 1) as alpha clip(x + beta / alpha, 0, 1 / alpha): 3 and 6 for the usual gate."""
        offset, top = (float(f"{value:.6g}") for value in (beta / alpha, 1 / alpha))
        lifted, clipped = (self._names.new(f"{result}_{part}") for part in ("lifted", "clipped"))
        yield self._node("Add", [source, self._scalar("offset", offset)], lifted)
        yield self._node("Clip", [lifted, self._scalar("zero", 0.0), self._scalar("top", top)], clipped)
        yield self._node("Mul", [clipped, self._scalar("slope", 1 / top)], result, name=name)

    def _is_over_last(self, node: onnx.NodeProto) -> bool:
        return attribute(node, "axis", -1) in (-1, len(self._shapes.get(node.input[0], ())) - 1)

    def _write_layer_norm(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Write a layer norm over the last dimension in the operators that opset 17 made one of."""
        source, scale, *bias = node.input
        result = node.output[0]
        parts = ("mean", "centered", "squares", "variance", "lifted", "deviation", "normalized", "scaled")
        mean, centered, squares, variance, lifted, deviation, normalized, scaled = (
            self._names.new(f"{result}_{part}") for part in parts
        )
        epsilon = self._scalar("epsilon", float(attribute(node, "epsilon", 1e-5)))
        yield self._node("ReduceMean", [source], mean, axes=[-1])
        yield self._node("Sub", [source, mean], centered)
        yield self._node("Mul", [centered, centered], squares)
        yield self._node("ReduceMean", [squares], variance, axes=[-1])
        yield self._node("Add", [variance, epsilon], lifted)
        yield self._node("Sqrt", [lifted], deviation)
        yield self._node("Div", [centered, deviation], normalized)
        yield self._node("Mul", [normalized, scale], scaled if bias else result, name=node.name)
        if bias:
            yield self._node("Add", [scaled, bias[0]], result)

    def _write_part_of_shape(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Write some of a shape's numbers, which opset 15 can ask for, as a slice of all of them."""
        whole = self._names.new(f"{node.output[0]}_whole")
        ends = (attribute(node, "start", 0), attribute(node, "end", len(self._shapes[node.input[0]])))
        yield self._node("Shape", [node.input[0]], whole, name=node.name)
        yield self._node("Slice", [whole, *(self._integer(end) for end in ends)], node.output[0])

    def _restate(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Return a node as the target's opset writes it."""
        if not onnx.defs.has(node.op_type, self._target, ""):
            raise TargetError(
                f"opset {self._target} does not have '{node.op_type}' of opset {self._source}",
                where={"node": node.name},
                hint="set [graph] opset of the target to a later one, or replace that layer of the net",
            )
        restated = deepcopy(node)
        if node.op_type in _AXES_AS_INPUT_FROM_18 and self._target < 18 and len(node.input) > 1:
            del restated.input[1:]
            restated.attribute.append(helper.make_attribute("axes", self._axes(node)))
        known = onnx.defs.get_schema(node.op_type, self._target, "").attributes
        kept = [entry for entry in restated.attribute if entry.name in known]
        del restated.attribute[:]
        restated.attribute.extend(kept)
        return restated

    def _axes(self, node: onnx.NodeProto) -> tuple[int, ...]:
        """Return the axes of a reduction, none where they are not numbers in the file."""
        if len(node.input) > 1:
            given = self.constants.get(node.input[1])
            return () if given is None else tuple(map(int, numpy_helper.to_array(given)))
        return tuple(attribute(node, "axes", ()))

    def _node(
        self,
        op_type: str,
        inputs: list[str],
        output: str,
        *,
        name: str = "",
        **attributes: int | float | list[int],
    ) -> onnx.NodeProto:
        node = helper.make_node(
            op_type, inputs, [output], name=name or self._names.new(f"{op_type}_{output}")
        )
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        return node

    def _integer(self, value: int) -> str:
        """Return the name of a new (1,) constant."""
        name = self._names.new("constant_integer")
        self.constants[name] = numpy_helper.from_array(np.array([value], dtype=np.int64), name)
        return name

    def _scalar(self, wish: str, value: float) -> str:
        """Return the name of a constant of this value; equal ones wished for by one name are one."""
        if (wish, value) not in self._scalars:
            name = self._scalars[wish, value] = self._names.new(f"constant_{wish}")
            self.constants[name] = numpy_helper.from_array(np.array(value, dtype=np.float32), name)
        return self._scalars[wish, value]


def _assemble(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
    *,
    opset: int,
) -> onnx.ModelProto:
    """Put the nodes into a model like the old one, keeping only what they read, and check it."""
    rewritten = deepcopy(model)
    graph = rewritten.graph
    read = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    # In the order of the old file, new ones last, so that equal nets give equal files.
    names = dict.fromkeys([*(tensor.name for tensor in graph.initializer), *sorted(constants)])
    initializers = []
    for name in names:
        if name in read:
            tensor = deepcopy(constants[name])
            tensor.name = name
            initializers.append(tensor)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    for field in _WITHOUT_METADATA:
        for entry in getattr(graph, field):
            del entry.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    del graph.metadata_props[:]
    del rewritten.opset_import[:]
    rewritten.opset_import.append(helper.make_opsetid("", opset))
    rewritten.ir_version = IR_VERSIONS[opset]
    return with_shapes(
        rewritten,
        problem=f"the graph does not hold in opset {opset}",
        hint=f"set [graph] opset of the target to {opset_of(model)}, and report the net",
    )


def with_shapes(model: onnx.ModelProto, *, problem: str, hint: str) -> onnx.ModelProto:
    """Return a model with the type and shape of every tensor, which passes onnx's full check.

    Raises:
        ParityError: it does not; the problem, with onnx's first line on it.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        onnx.checker.check_model(inferred, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise ParityError(f"{problem}: {str(exc).strip().splitlines()[0]}", hint=hint) from exc
    return inferred
