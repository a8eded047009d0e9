"""The ends of an exported graph: raw RGB bytes in instead of normalized floats, probabilities out instead of logits.

A graph gets them last, after its precision: what is calibrated, kept in float32 or quantized is the net between the ends.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgecl.config.target import Graph
from edgecl.deploy.graph import Names, with_shapes
from edgecl.deploy.graph_index import GraphIndex, attribute
from edgecl.storage.records import Preprocessing

Array = NDArray[Any]


def with_ends(model: onnx.ModelProto, *, graph: Graph, preprocessing: Preprocessing) -> onnx.ModelProto:
    """Put the input and the output that a target asks for around a net.

    Args:
        model: (N, 3, H, W) normalized float32 -> (N, K) float32, in any precision; it is left as it is.
        graph: `input` and `softmax` of it.
        preprocessing: the mean and std that the net expects.

    Returns:
        a new model, checked; its input and output keep their names. The same one where nothing is asked for.
    """
    if graph.input == "float32" and not graph.softmax:
        return model
    changed = deepcopy(model)
    if graph.input != "float32":
        _take_bytes(changed, channels_last=graph.input == "uint8", preprocessing=preprocessing)
    if graph.softmax:
        end_in_softmax(changed)
    return with_shapes(
        changed,
        problem="the graph does not hold with the input and output asked for",
        hint="set [graph] input = 'float32' and softmax = false in the target, and report the net",
    )


def _take_bytes(model: onnx.ModelProto, *, channels_last: bool, preprocessing: Preprocessing) -> None:
    """Have a net take bytes 0 to 255: convert them, put channels first, and normalize, in the first convolution if it can.

    TensorRT takes bytes only where a Cast reads them, so the Cast comes first.
    """
    graph, names = model.graph, Names(model.graph)
    (entry,) = graph.input
    mean, std = (255 * np.array(values) for values in (preprocessing.mean, preprocessing.std))
    shift, scale = _fold(graph, names, mean=mean, std=std)
    nodes: list[onnx.NodeProto] = []
    tensor = entry.name

    def append(kind: str, wish: str, *constants: Array, **attributes: Any) -> None:
        nonlocal tensor
        inputs = [tensor]
        for values in constants:
            inputs.append(names.new(f"{entry.name}_{wish}_by"))
            graph.initializer.append(numpy_helper.from_array(values, inputs[-1]))
        tensor = names.new(f"{entry.name}_{wish}")
        nodes.append(
            helper.make_node(kind, inputs, [tensor], name=names.new(f"{kind}_{tensor}"), **attributes)
        )

    append("Cast", "float", to=TensorProto.FLOAT)
    if channels_last:
        append("Transpose", "nchw", perm=[0, 3, 1, 2])
    if shift is not None:
        append("Sub", "shifted", _per_channel(shift))
    if scale is not None:
        append("Mul", "scaled", _per_channel(scale))
    _rename_inputs(graph, entry.name, tensor)
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    kind = entry.type.tensor_type
    kind.elem_type = TensorProto.UINT8
    if channels_last:
        sides = deepcopy(list(kind.shape.dim))
        del kind.shape.dim[:]
        kind.shape.dim.extend(sides[place] for place in (0, 2, 3, 1))


def _fold(
    graph: onnx.GraphProto, names: Names, *, mean: Array, std: Array
) -> tuple[Array | None, Array | None]:
    """Fold (x - mean) / std into the convolution that alone reads the input, as far as that is exact.

    The division always is. The subtraction is where the convolution pads nothing: zeros around normalized pixels stand for
    pixels of the mean, which is no byte.

    Returns:
        what is still to be subtracted from each channel, and what to multiply it with then; None where nothing is.
    """
    links = GraphIndex(graph)
    conv = _only_reader(links, graph.input[0].name)
    if conv is None or conv.op_type != "Conv" or not {*conv.input[1:]} <= links.constants.keys():
        return mean, 1 / std
    weight = numpy_helper.to_array(links.constants[conv.input[1]])
    if weight.shape[1] != len(std):
        return mean, 1 / std
    scaled = (weight.astype(np.float64) / std.reshape(-1, *[1] * (weight.ndim - 2))).astype(weight.dtype)
    conv.input[1] = _add(graph, names, conv.input[1], scaled)
    pads = any(attribute(conv, "pads", ())) or attribute(conv, "auto_pad", b"NOTSET") not in (
        b"NOTSET",
        b"VALID",
    )
    if pads:
        return (mean if mean.any() else None), None
    # From the weights as they are rounded, so that what they are off by cancels at the mean.
    offset = -scaled.astype(np.float64).sum(tuple(range(2, weight.ndim))) @ mean
    if len(conv.input) > 2:
        offset += numpy_helper.to_array(links.constants[conv.input[2]]).astype(np.float64)
        conv.input[2] = _add(graph, names, conv.input[2], offset.astype(weight.dtype))
    else:
        conv.input.append(names.new(f"{conv.output[0]}_bias"))
        graph.initializer.append(numpy_helper.from_array(offset.astype(weight.dtype), conv.input[2]))
    return None, None


def _only_reader(links: GraphIndex, tensor: str) -> onnx.NodeProto | None:
    """Return the one node that reads a tensor, beyond a Cast."""
    readers = links.readers[tensor]
    if len(readers) != 1:
        return None
    return _only_reader(links, readers[0].output[0]) if readers[0].op_type == "Cast" else readers[0]


def _add(graph: onnx.GraphProto, names: Names, old: str, values: Array) -> str:
    """Add a constant in place of another, which goes unless something else reads it too."""
    name = names.new(f"{old}_of_bytes")
    graph.initializer.append(numpy_helper.from_array(values, name))
    if sum(old in node.input for node in graph.node) == 1:
        del graph.initializer[[tensor.name for tensor in graph.initializer].index(old)]
    return name


def _per_channel(values: Array) -> Array:
    return values.astype(np.float32).reshape(1, -1, 1, 1)


def end_in_softmax(model: onnx.ModelProto) -> None:
    """Turn a net's logits into probabilities under the name that its output has, in place."""
    graph = model.graph
    (end,) = graph.output
    logits = Names(graph).new("logits")
    _rename_inputs(graph, end.name, logits)
    for node in graph.node:
        for place, name in enumerate(node.output):
            if name == end.name:
                node.output[place] = logits
    graph.node.append(
        helper.make_node("Softmax", [logits], [end.name], name=Names(graph).new("Softmax_end"), axis=1)
    )


def _rename_inputs(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new
