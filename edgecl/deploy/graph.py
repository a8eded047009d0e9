"""One portable ONNX graph from what torch exports: the opset and the operators that a runtime knows.

`onnx.version_converter` (onnx 1.23) does not do it: from opset 18 to 17 it leaves `noop_with_empty_axes` on ReduceMean,
which opset 17 refuses, and to 13 it has no adapter for HardSwish and Mul. Upwards it gives the same outputs.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgecl.errors import ParityError, TargetError

HardSwish = Literal["keep", "hard_sigmoid", "clip"]

IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10}
"""Opset -> the oldest file version that may carry it, which is what old runtimes still read."""

_AXES_AS_INPUT_FROM_18 = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)
# Operators that mean something else from this opset on, while their signature stayed the same.
_MEANING_CHANGED_AT = {"GridSample": 20, "GroupNormalization": 21}
# The exporter notes where in torch a tensor comes from; readers older than file version 10 have no such field.
_WITHOUT_METADATA = ("node", "initializer", "input", "output")

Shape = tuple[int | str, ...]


def portable(model: onnx.ModelProto, *, opset: int, hard_swish: HardSwish) -> onnx.ModelProto:
    """Rewrite an exported graph to an opset and to operators that TensorRT and ONNX Runtime take everywhere.

    A mean over height and width becomes GlobalAveragePool, a reshape to (N, F) becomes Flatten, hard-swish takes the
    form asked for. What remains is rewritten to the target's opset. Every tensor that both graphs have keeps its name.

    Args:
        model: a float32 graph of standard operators, with a static or a dynamic batch; it is left as it is.
        opset: 13 to 22.
        hard_swish: "keep" as HardSwish (opset 14 and later), "hard_sigmoid" as HardSigmoid and Mul, or "clip" as
            Add, Clip, Mul, Mul; "clip" writes HardSigmoid as Add, Clip, Mul too, so that integers can carry it.

    Returns:
        a new model, checked, with shapes of all its tensors and the metadata of the old one.

    Raises:
        TargetError: the graph cannot be written in that opset or form.
        ParityError: the rewritten graph does not pass ONNX's own check.
    """
    if opset not in IR_VERSIONS:
        raise TargetError(
            f"cannot write opset {opset}: edgecl knows {min(IR_VERSIONS)} to {max(IR_VERSIONS)}",
            hint="change [graph] opset in the target",
        )
    if hard_swish == "keep" and opset < 14:
        raise TargetError(
            f"opset {opset} has no HardSwish: it begins at opset 14",
            hint='set [graph] hard_swish = "hard_sigmoid" in the target, or opset = 14 or later',
        )
    _check_domains(model)
    rewriter = _Rewriter(model, opset=opset, hard_swish=hard_swish)
    nodes = [written for node in model.graph.node for written in rewriter.rewrite(node)]
    return _assemble(model, nodes, rewriter.constants, opset=opset)


def opset_of(model: onnx.ModelProto) -> int:
    """Return the opset of a model's standard operators."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def shapes_of(model: onnx.ModelProto) -> dict[str, Shape]:
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


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node that has no name, or that of an earlier node, a name of its own."""
    names, seen = Names(graph), set()
    for node in graph.node:
        if not node.name or node.name in seen:
            node.name = names.node(node.name or f"{node.op_type}_{node.output[0]}")
        seen.add(node.name)


class Names:
    """Names that a graph does not use yet.

    Args:
        graph: the graph whose tensors and nodes have names already.
    """

    def __init__(self, graph: onnx.GraphProto):
        self._tensors = {tensor.name for values in (graph.input, graph.initializer) for tensor in values}
        self._tensors.update(name for node in graph.node for name in (*node.input, *node.output))
        self._nodes = {node.name for node in graph.node}

    def tensor(self, wish: str) -> str:
        """Return the wish, or the wish with the first number that makes it a new tensor."""
        return _unused(wish, self._tensors)

    def node(self, wish: str) -> str:
        """Return the wish, or the wish with the first number that makes it a new node."""
        return _unused(wish, self._nodes)


def _unused(wish: str, used: set[str]) -> str:
    name, number = wish, 1
    while name in used:
        number += 1
        name = f"{wish}_{number}"
    used.add(name)
    return name


def _check_domains(model: onnx.ModelProto) -> None:
    foreign = next((node for node in model.graph.node if node.domain not in ("", "ai.onnx")), None)
    if foreign is not None:
        raise TargetError(
            f"'{foreign.op_type}' is an operator of '{foreign.domain}', which only some runtimes have",
            where={"node": foreign.name or foreign.output[0]},
            hint="export the net itself, not a file that a runtime has optimized",
        )
    if model.functions:
        raise TargetError(
            f"the graph calls the function '{model.functions[0].name}' of its own; edgecl writes flat graphs",
            hint="inline it with onnx.inliner.inline_local_functions",
        )
    for node in model.graph.node:
        if any(
            attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
            for attribute in node.attribute
        ):
            raise TargetError(
                f"'{node.op_type}' holds a graph of its own; edgecl writes nets without branches and loops",
                where={"node": node.name or node.output[0]},
            )


class _Rewriter:
    """Rewrites each node to the target's opset and forms.

    Args:
        model: the graph the nodes come from.
        opset: what is written.
        hard_swish: the form of hard-swish.
    """

    def __init__(self, model: onnx.ModelProto, *, opset: int, hard_swish: HardSwish):
        self._source = opset_of(model)
        self._target = opset
        self._hard_swish = hard_swish
        self._shapes = shapes_of(model)
        self._names = Names(model.graph)
        self._given: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self._added: dict[str, onnx.TensorProto] = {}
        self._written: dict[tuple[str, bytes], str] = {}
        self.constants: MutableMapping[str, onnx.TensorProto] = ChainMap(self._added, self._given)
        """Name -> constant tensor: those of the model and those that rewriting added."""
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._given.setdefault(node.output[0], node.attribute[0].t)

    def rewrite(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Yield the nodes that compute what one node computed."""
        # Constants of the old graph are initializers of the new one, if anything still reads them.
        if node.op_type == "Constant" and node.output[0] in self._given:
            return
        if node.op_type == "ReduceMean" and self._is_spatial_mean(node):
            yield from self._pool(node)
        elif node.op_type == "Reshape" and self._is_flatten(node):
            yield self._node("Flatten", [node.input[0]], node.output[0], name=node.name, axis=1)
        elif node.op_type == "HardSwish" and self._hard_swish != "keep":
            yield from self._write_hard_swish(node)
        elif node.op_type == "HardSigmoid" and self._hard_swish == "clip":
            alpha, beta = _attribute(node, "alpha", 0.2), _attribute(node, "beta", 0.5)
            yield from self._write_hard_sigmoid(node, alpha=float(alpha), beta=float(beta))
        elif node.op_type == "LayerNormalization" and self._target < 17 and self._is_over_last(node):
            yield from self._write_layer_norm(node)
        else:
            yield self._restate(node)

    def _is_spatial_mean(self, node: onnx.NodeProto) -> bool:
        axes = self._axes(node)
        return (
            axes is not None
            and len(self._shape(node.input[0])) == 4
            and {axis % 4 for axis in axes} == {2, 3}
        )

    def _pool(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        if _attribute(node, "keepdims", 1):
            yield self._node("GlobalAveragePool", [node.input[0]], node.output[0], name=node.name)
            return
        pooled = self._names.tensor(f"{node.output[0]}_pooled")
        yield self._node("GlobalAveragePool", [node.input[0]], pooled, name=node.name)
        yield self._node("Flatten", [pooled], node.output[0], axis=1)

    def _is_flatten(self, node: onnx.NodeProto) -> bool:
        """Return whether a reshape keeps the first dimension and joins all others."""
        old, new = self._shape(node.input[0]), self._shape(node.output[0])
        if len(new) != 2 or len(old) < 2 or not all(isinstance(side, int) and side > 0 for side in old[1:]):
            return False
        # With the product of the other dimensions as second dimension the first cannot be anything but N.
        return new[1] == math.prod(side for side in old[1:] if isinstance(side, int))

    def _write_hard_swish(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        source, result = node.input[0], node.output[0]
        if self._hard_swish == "hard_sigmoid":
            gate = self._names.tensor(f"{result}_gate")
            yield self._node("HardSigmoid", [source], gate, alpha=1 / 6, beta=0.5)
        else:
            lifted, clipped, gate = (
                self._names.tensor(f"{result}_{part}") for part in ("lifted", "clipped", "gate")
            )
            yield self._node("Add", [source, self._scalar("three", 3.0)], lifted)
            yield self._node("Clip", [lifted, self._scalar("zero", 0.0), self._scalar("six", 6.0)], clipped)
            yield self._node("Mul", [clipped, self._scalar("sixth", 1 / 6)], gate)
        yield self._node("Mul", [source, gate], result, name=node.name)

    def _write_hard_sigmoid(
        self, node: onnx.NodeProto, *, alpha: float, beta: float
    ) -> Iterator[onnx.NodeProto]:
        # clip(alpha x + beta, 0, 1) = alpha clip(x + beta / alpha, 0, 1 / alpha): 3 and 6 for the usual alpha and beta.
        result = node.output[0]
        offset, top = (float(f"{value:.6g}") for value in (beta / alpha, 1 / alpha))
        lifted, clipped = (self._names.tensor(f"{result}_{part}") for part in ("lifted", "clipped"))
        usual = (offset, top) == (3.0, 6.0)
        yield self._node("Add", [node.input[0], self._scalar("three" if usual else "offset", offset)], lifted)
        bounds = [self._scalar("zero", 0.0), self._scalar("six" if usual else "top", top)]
        yield self._node("Clip", [lifted, *bounds], clipped)
        yield self._node(
            "Mul", [clipped, self._scalar("sixth" if usual else "slope", 1 / top)], result, name=node.name
        )

    def _is_over_last(self, node: onnx.NodeProto) -> bool:
        return _attribute(node, "axis", -1) in (-1, len(self._shape(node.input[0])) - 1)

    def _write_layer_norm(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Write a layer norm over the last dimension in the operators that opset 17 made one of."""
        source, scale, *bias = node.input
        result = node.output[0]
        parts = ("mean", "centered", "squares", "variance", "lifted", "deviation", "normalized", "scaled")
        mean, centered, squares, variance, lifted, deviation, normalized, scaled = (
            self._names.tensor(f"{result}_{part}") for part in parts
        )
        epsilon = self._scalar("epsilon", float(_attribute(node, "epsilon", 1e-5)))
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

    def _restate(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Return a node in the target's opset, or refuse it."""
        old, new = self._schema(node, self._source), self._schema(node, self._target)
        restated = onnx.NodeProto()
        restated.CopyFrom(node)
        if old.since_version == new.since_version:
            return restated
        changed = _MEANING_CHANGED_AT.get(node.op_type)
        if changed and min(self._source, self._target) < changed <= max(self._source, self._target):
            raise self._refusal(node, f"it means something else from opset {changed} on")
        if node.op_type == "AveragePool" and _attribute(node, "ceil_mode", 0):
            raise self._refusal(node, "ceil_mode is computed differently from opset 19 on")
        if node.op_type == "Reshape" and self._allows_no_zero(node):
            _drop(restated, "allowzero")
        if node.op_type in _AXES_AS_INPUT_FROM_18:
            self._move_axes(node, restated)
        for attribute in list(restated.attribute):
            if attribute.name in new.attributes:
                continue
            if not _is_default(attribute, old):
                raise self._refusal(node, f"opset {self._target} has no '{attribute.name}' there")
            _drop(restated, attribute.name)
        if not new.min_input <= len(restated.input) <= new.max_input:
            raise self._refusal(
                node,
                f"it has {len(restated.input)} inputs, of which opset {self._target} takes at most {new.max_input}",
            )
        return restated

    def _move_axes(self, node: onnx.NodeProto, restated: onnx.NodeProto) -> None:
        """Write the axes of a reduction as the target wants them: an attribute up to opset 17, an input from 18."""
        axes = self._axes(node)
        if self._target >= 18 and self._source < 18 and axes is not None:
            _drop(restated, "axes")
            name = self._constant(f"{node.output[0]}_axes", np.array(axes, dtype=np.int64))
            restated.input.append(name)
        elif self._target < 18 <= self._source and len(node.input) > 1:
            if axes is None:
                raise self._refusal(
                    node, f"its axes '{node.input[1]}' are computed, opset {self._target} needs numbers"
                )
            _drop(restated, "noop_with_empty_axes")
            del restated.input[1:]
            restated.attribute.append(helper.make_attribute("axes", list(axes)))

    def _axes(self, node: onnx.NodeProto) -> tuple[int, ...] | None:
        """Return the axes of a reduction, or None where they are not numbers in the file."""
        if len(node.input) > 1 and node.input[1]:
            given = self.constants.get(node.input[1])
            return (
                tuple(int(axis) for axis in numpy_helper.to_array(given)) or None
                if given is not None
                else None
            )
        return tuple(_attribute(node, "axes", ())) or None

    def _allows_no_zero(self, node: onnx.NodeProto) -> bool:
        """Return whether 0 is absent from the shape, so that it does not matter what 0 means."""
        shape = self.constants.get(node.input[1])
        return shape is not None and 0 not in numpy_helper.to_array(shape)

    def _shape(self, tensor: str) -> Shape:
        return self._shapes.get(tensor, ())

    def _schema(self, node: onnx.NodeProto, opset: int) -> onnx.defs.OpSchema:
        try:
            return onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError:
            raise self._refusal(node, f"opset {opset} does not have it") from None

    def _refusal(self, node: onnx.NodeProto, reason: str) -> TargetError:
        """Return the error for a node that has no form in the target's opset."""
        hint = "replace that layer of the net"
        if onnx.defs.has(node.op_type, self._source, ""):
            since = onnx.defs.get_schema(node.op_type, self._source, "").since_version
            side = f"{since} or later" if since > self._target else f"{self._source}"
            hint = f"set [graph] opset of the target to {side}, or {hint}"
        return TargetError(
            f"cannot write '{node.op_type}' of opset {self._source} in opset {self._target}: {reason}",
            where={"node": node.name or node.output[0]},
            hint=hint,
        )

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
            op_type, inputs, [output], name=name or self._names.node(f"{op_type}_{output}")
        )
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        return node

    def _scalar(self, name: str, value: float) -> str:
        return self._constant(f"constant_{name}", np.array(value, dtype=np.float32))

    def _constant(self, wish: str, value: NDArray[np.generic]) -> str:
        """Return the name of a constant of this value; equal ones wished for by one name are one."""
        key = (wish, value.tobytes())
        if key not in self._written:
            name = self._names.tensor(wish)
            self._added[name] = numpy_helper.from_array(value, name)
            self._written[key] = name
        return self._written[key]


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def _drop(node: onnx.NodeProto, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _is_default(attribute: onnx.AttributeProto, schema: onnx.defs.OpSchema) -> bool:
    known = schema.attributes.get(attribute.name)
    if known is None or not known.default_value.name:
        return False
    return bool(helper.get_attribute_value(attribute) == helper.get_attribute_value(known.default_value))


def _assemble(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
    *,
    opset: int,
) -> onnx.ModelProto:
    """Put the nodes into a model like the old one, keeping only what they read, and check it."""
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(model)
    graph = rewritten.graph
    read = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    # In the order of the old file, new ones last, so that equal nets give equal files.
    names = dict.fromkeys([*(tensor.name for tensor in graph.initializer), *sorted(constants)])
    initializers = []
    for name in names:
        if name in read:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(constants[name])
            tensor.name = name
            initializers.append(tensor)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    name_nodes(graph)
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
