"""DeepStream: a configuration of nvinfer, and the net with what nvinfer's one scale cannot express folded into it.

nvinfer computes net-scale-factor * (x - offsets) of pixels from 0 to 255, with one factor for all channels, and takes the
outputs of a classifier for probabilities. So the first convolution takes over the ratios between the channels' standard
deviations, which leaves zero padding what it is, and a softmax ends the graph.

Source: https://docs.nvidia.com/metropolis/deepstream/dev-guide/text/DS_plugin_gst-nvinfer.html
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgecl.deploy.contract import contract_of, render
from edgecl.deploy.ends import end_in_softmax
from edgecl.deploy.graph import Names
from edgecl.deploy.graph_index import attribute
from edgecl.onboard.bundle import onnx_name
from edgecl.storage.directories import Bundle
from edgecl.storage.records import Manifest
from edgecl.storage.writing import write_bytes

MODEL, CONFIG, LABELS = "deepstream.onnx", "deepstream.txt", "deepstream-labels.txt"


def write(bundle: Bundle, manifest: Manifest) -> dict[str, str]:
    """Write configuration, net and names into a bundle for TensorRT, which nvinfer runs; it gives no net bytes."""
    contract = contract_of(manifest)
    if manifest.runtime != "tensorrt" or not contract.normalize:
        return {}
    std = contract.preprocessing.std
    mean_std = sum(std) / len(std)
    model = fold_scale(onnx.load(bundle.path / onnx_name("fp32")), [mean_std / one for one in std])
    # Of the other input.
    props = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(
        model, {key: props[key] for key in props if key not in ("edgecl.mean", "edgecl.std")}
    )
    if contract.labels is not None and contract.one_class:
        if not contract.softmax:
            end_in_softmax(model)
        # One line: each stands for an output, and nvinfer splits it at semicolons.
        names = ";".join(name.replace(";", ",") for name in contract.labels)
        write_bytes(bundle.path / LABELS, f"{names}\n".encode())
    onnx.checker.check_model(model)
    write_bytes(bundle.path / MODEL, model.SerializeToString())
    config = render(
        "deepstream.txt.j2",
        contract=contract,
        factor=1 / (255 * mean_std),
        offsets=";".join(repr(255 * mean) for mean in contract.preprocessing.mean),
        mode=0 if manifest.precision == "fp32" else 2,
        model=MODEL,
        labels=LABELS,
    )
    write_bytes(bundle.path / CONFIG, config.encode())
    return {CONFIG: "a configuration of DeepStream's nvinfer, for deepstream.onnx"}


def fold_scale(model: onnx.ModelProto, ratios: Sequence[float]) -> onnx.ModelProto:
    """Multiply each channel of a net's input (N, C, H, W) by a ratio, within the convolutions that read it, in place.

    A net that does not begin with convolutions over all channels multiplies its input.
    """
    graph = model.graph
    name, names = graph.input[0].name, Names(graph)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    readers = [node for node in graph.node if name in node.input]
    factors = np.array(ratios).reshape(1, -1, 1, 1)
    if all(node.op_type == "Conv" and attribute(node, "group", 1) == 1 for node in readers):
        for node in readers:
            folded = numpy_helper.to_array(weights[node.input[1]]) * factors
            node.input[1] = names.new(f"{node.input[1]}_scaled")
            graph.initializer.append(numpy_helper.from_array(folded.astype(np.float32), node.input[1]))
        read = {one for node in graph.node for one in node.input}
        unused = [tensor for tensor in graph.initializer if tensor.name not in read]
        for tensor in unused:
            graph.initializer.remove(tensor)
        return model
    scaled, ratio = names.new(f"{name}_scaled"), names.new("ratios")
    for node in readers:
        node.input[:] = [scaled if one == name else one for one in node.input]
    graph.initializer.append(numpy_helper.from_array(factors.astype(np.float32), ratio))
    graph.node.insert(0, helper.make_node("Mul", [name, ratio], [scaled], name=names.new("scale")))
    return model
