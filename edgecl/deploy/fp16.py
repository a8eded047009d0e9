"""A float32 ONNX graph -> the same net in float16, with float32 where float16 would overflow.

onnxruntime's own converter (1.32, `convert_float_to_float16` with float32 inputs and outputs) does not do it: its casts
stand behind the nodes that read them, and ONNX's check refuses the graph.
"""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgecl.deploy.graph import Names, opset_of, with_shapes
from edgecl.deploy.session import open_tensors

# Images at a time; all intermediate tensors of a batch are in memory at once.
_BATCH = 4
# The largest magnitude to convert; float16 ends at 65504.
_LIMIT = 6e4


def half(model: onnx.ModelProto, *, images: NDArray[np.float32]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Convert a net to float16, its inputs and outputs apart, which stay float32.

    The net runs on the images in float32 first. Nodes that write or read a tensor beyond the limit, or a weight beyond
    it, stay in float32, and so do operators that have no float16 form; Casts stand only between the two kinds.

    Args:
        model: a float32 graph as `edgecl.deploy.graph.portable` writes it; it is left as it is.
        images: (N, 3, H, W) preprocessed images, N >= 1.

    Returns:
        a new model, checked, and {"largest": the largest finite magnitude of any tensor on the images, "kept_fp32":
        the names of the nodes that stay in float32}.

    Raises:
        ParityError: the converted graph does not pass ONNX's own check.
    """
    converted = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    peaks = _largest_magnitudes(converted, images)
    for tensor in _floats(converted.graph):
        values = numpy_helper.to_array(tensor)
        peaks[tensor.name] = float(np.abs(values).max()) if values.size else 0.0
    # A tensor that is not a number compares as False, and must not pass.
    beyond = {name for name, peak in peaks.items() if not peak <= _LIMIT}
    kept = [
        node.name
        for node in converted.graph.node
        if beyond.intersection((*node.input, *node.output)) or _fp32_only(node, converted)
    ]
    _convert(converted, set(kept))
    converted = with_shapes(
        converted,
        problem="the net does not hold in float16",
        hint="leave fp16 out of the target's precisions, and report the net",
    )
    largest = max((peak for peak in peaks.values() if np.isfinite(peak)), default=0.0)
    return converted, {"largest": largest, "kept_fp32": kept}


def _largest_magnitudes(model: onnx.ModelProto, images: NDArray[np.float32]) -> dict[str, float]:
    """Return the largest magnitude of every float32 tensor of a net over the images, inf where a value is not finite."""
    values = [*model.graph.value_info, *model.graph.output]
    names = [value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT]
    # Optimized graphs lack the tensors that were fused away, and TensorRT may compute them all.
    run = open_tensors(model, names, optimization="NONE")
    peaks: dict[str, float] = defaultdict(float)
    for name, found in run(images, _BATCH):
        peak = float(np.abs(found).max()) if np.isfinite(found).all() else np.inf
        peaks[name] = max(peaks[name], peak)
    return peaks


def _floats(graph: onnx.GraphProto) -> list[TensorProto]:
    return [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT]


def _fp32_only(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Return whether an operator has an input that must be float32, as Resize, or says itself what it writes."""
    schema = onnx.defs.get_schema(node.op_type, opset_of(model), "")
    tied = {parameter.type_str for parameter in schema.inputs}
    takes_no_fp16 = any(
        "tensor(float)" in parameter.types and "tensor(float16)" not in parameter.types
        for parameter in schema.inputs
    )
    return takes_no_fp16 or any(
        "tensor(float)" in parameter.types and parameter.type_str not in tied for parameter in schema.outputs
    )


def _convert(model: onnx.ModelProto, kept: set[str]) -> None:
    """Put every node but the kept ones into float16, in place."""
    graph = model.graph
    names = Names(graph)
    values = [*graph.input, *graph.value_info, *graph.output]
    floats = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    outputs = floats & {value.name for value in graph.output}
    wide = {value.name for value in graph.input}
    wide.update(name for node in graph.node if node.name in kept for name in node.output)
    weights = _narrow_weights(graph, kept, names)
    renamed: dict[str, str] = {}
    casts: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []

    def cast(tensor: str, *, to: int, name: str) -> None:
        nodes.append(helper.make_node("Cast", [tensor], [name], to=to, name=names.new(f"Cast_{name}")))

    for node in graph.node:
        in_fp32 = node.name in kept
        for index, tensor in enumerate(node.input):
            if tensor in weights and not in_fp32:
                node.input[index] = weights[tensor]
            elif tensor not in floats:
                continue
            elif (tensor in wide) == in_fp32:
                node.input[index] = renamed.get(tensor, tensor)
            else:
                if tensor not in casts:
                    casts[tensor] = names.new(f"{tensor}_{'fp32' if in_fp32 else 'fp16'}")
                    to = TensorProto.FLOAT if in_fp32 else TensorProto.FLOAT16
                    cast(renamed.get(tensor, tensor), to=to, name=casts[tensor])
                node.input[index] = casts[tensor]
        nodes.append(node)
        for index, tensor in enumerate(node.output):
            if tensor in outputs and not in_fp32:
                renamed[tensor] = names.new(f"{tensor}_fp16")
                node.output[index] = renamed[tensor]
                cast(renamed[tensor], to=TensorProto.FLOAT, name=tensor)
    copies = deepcopy(nodes)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)


def _narrow_weights(graph: onnx.GraphProto, kept: set[str], names: Names) -> dict[str, str]:
    """Convert the weights that float16 nodes read, and return their names there; others may read the old ones."""
    readers: dict[bool, set[str]] = {True: set(), False: set()}
    for node in graph.node:
        readers[node.name in kept].update(node.input)
    narrow: dict[str, str] = {}
    for tensor in _floats(graph):
        if tensor.name not in readers[False]:
            continue
        shared = tensor.name in readers[True]
        narrow[tensor.name] = names.new(f"{tensor.name}_fp16") if shared else tensor.name
        values = numpy_helper.to_array(tensor).astype(np.float16)
        target = graph.initializer.add() if shared else tensor
        target.CopyFrom(numpy_helper.from_array(values, narrow[tensor.name]))
    return narrow
