"""What an engine computes in: the precision of its layers, as TensorRT's inspector, its log or a network tell it.

A layer is a dictionary as the inspector of TensorRT writes it in JSON (with detailed verbosity), or a bare name (without).
"""

import json
import re
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence, Union

from .errors import DeviceError

Layer = Union[str, Dict[str, Any]]

LOG_BEGINS = "Layers:\n"
"""The message of the verbose log in which a builder lists the layers of the engine it made."""

# Less than this part of the share that the graph asks for is not what was asked. Not more: before strong typing TensorRT
# takes whatever kernel is fastest, and for single layers that may be a wider one.
LEAST_PART = 0.25

# The narrowest of a layer's inputs says what it computes in.
_NARROWNESS = ("int8", "fp8", "fp16", "bf16", "fp32")
# Layers that move or rename values: their precision says nothing about how the net is computed.
_MOVING = frozenset(
    "reformat noop nooplayer constant shuffle shape signal wait cast identity copy transpose slice "
    "quantize dequantize".split()
)
_MATRIX_TYPES = ("conv", "correlation", "gemm", "matrix", "fullyconnected", "fully_connected", "dla")
# How a fused layer of TensorRT 10 and later is called after its parts, such as '__myl_CorrMulAddMinMax_myl0_1'.
_MATRIX_PART = re.compile(r"__myl_\w*?(Corr|Conv(?!ert)|Gemm|MatMul)")


def precision_of(text: str) -> Optional[str]:
    """Return the precision that a data type or a tensor format names, such as 'fp16' for 'Row major linear FP16 format'.

    None for types that say nothing: booleans, indices, 'N/A due to dynamic shapes'.
    """
    lower = text.lower()
    for marks, precision in (
        (("int32", "int64", "bool", "uint8"), None),
        (("int8",), "int8"),
        (("fp8", "float8"), "fp8"),
        (("bf16", "bfloat16"), "bf16"),
        (("half", "fp16", "float16"), "fp16"),
        (("float", "fp32", "tf32"), "fp32"),
    ):
        if any(mark in lower for mark in marks):
            return precision
    return None


def precision_of_layer(layer: Layer) -> Optional[str]:
    """Return what a layer computes in, or None where nothing says so: 'fp32', 'fp16', 'bf16', 'fp8' or 'int8'."""
    if isinstance(layer, str):
        return None
    weights = layer.get("Weights")
    if isinstance(weights, dict) and precision_of(str(weights.get("Type", ""))):
        return precision_of(str(weights["Type"]))
    for side in ("Inputs", "Outputs"):
        seen = {precision_of(_type_of(tensor)) for tensor in layer.get(side) or []}
        for precision in _NARROWNESS:
            if precision in seen:
                return precision
    return None


def _type_of(tensor: Any) -> str:
    if not isinstance(tensor, dict):
        return ""
    return str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")


def is_matrix_layer(layer: Layer) -> bool:
    """Return whether a layer is a convolution or a matrix product, alone or fused with others."""
    if isinstance(layer, str):
        return False
    kind = str(layer.get("LayerType", "")).lower()
    if kind in _MOVING:
        return False
    return (
        "Weights" in layer
        or any(mark in kind for mark in _MATRIX_TYPES)
        or bool(_MATRIX_PART.match(str(layer.get("Name", ""))))
    )


def count_precisions(layers: Sequence[Layer]) -> Dict[str, int]:
    """Return how many layers compute in each precision; those that only move values are left out.

    A layer that does not say is counted as 'unknown'.
    """
    counts = Counter(
        precision_of_layer(layer) or "unknown"
        for layer in layers
        if isinstance(layer, str) or str(layer.get("LayerType", "")).lower() not in _MOVING
    )
    return dict(sorted(counts.items()))


def precision_shares(layers: Sequence[Layer]) -> Dict[str, float]:
    """Return the share of the convolutions and matrix products that compute in each precision.

    Where none says its precision, nothing is returned.
    """
    known = [precision_of_layer(layer) for layer in layers if is_matrix_layer(layer)]
    counts = Counter(precision for precision in known if precision)
    total = sum(counts.values())
    return {precision: count / total for precision, count in sorted(counts.items())}


def shares_in_words(shares: Dict[str, float]) -> str:
    """Return what `precision_shares` returned as 'fp16 95 %, int8 5 %'."""
    return ", ".join("%s %.0f %%" % (name, 100 * share) for name, share in shares.items())


def check_delivered(
    shares: Dict[str, float], asked: str, *, expected: float = 1.0, maker: str = "TensorRT"
) -> bool:
    """Check that an engine computes in the precision that was asked for.

    Args:
        shares: what `precision_shares` returned; where it is empty nothing can be checked.
        expected: the share that the graph asks for, 0 to 1; for int8 that of the quantized layers.

    Returns whether the layers were enough to check it.

    Raises:
        DeviceError: not delivered: less than a quarter of the expected share, or none at all.
    """
    if asked == "fp32":
        return True  # wider than asked for cannot be, and narrower is only what the graph says
    if not shares:
        return False
    found = shares.get(asked, 0.0)
    if found > 0 and found >= LEAST_PART * expected:
        return True
    raise DeviceError(
        "asked for %s and not delivered: %s computes %.0f %% of the convolutions and matrix products in it, the graph "
        "asks for %.0f %% (%s)" % (asked, maker, 100 * found, 100 * expected, shares_in_words(shares)),
        "this device or version has no faster %s layers for this net; take another precision, such as %s"
        % (asked, "fp16" if asked == "int8" else "fp32"),
    )


def read_layers(text: str) -> List[Layer]:
    """Return the layers in an inspector's JSON: a whole engine, a list, or one layer.

    Raises:
        ValueError: not JSON. TensorRT leaves quotes within names unescaped.
    """
    content = json.loads(text)
    if isinstance(content, dict) and "Layers" in content:
        content = content["Layers"]
    return list(content) if isinstance(content, list) else [content]


def layers_of_engine(trt: Any, engine: Any) -> List[Layer]:
    """Return the layers of a deserialized engine."""
    inspector = engine.create_engine_inspector()
    form = trt.LayerInformationFormat.JSON
    try:
        return read_layers(inspector.get_engine_information(form))
    except ValueError:
        pass
    layers: List[Layer] = []
    for index in range(engine.num_layers):
        text = inspector.get_layer_information(index, form)
        try:
            layers += read_layers(text)
        except ValueError:
            layers.append(text)
    return layers


def layers_of_log(messages: Sequence[str]) -> List[Layer]:
    """Return the layers that a builder listed in its verbose log, or none.

    One layer a line: 'Name: conv1, LayerType: correlation, Inputs: [ { Name: .., Datatype: Half, .. }], Constants: ..'.
    """
    layers: List[Layer] = []
    for message in messages:
        if not message.startswith(LOG_BEGINS):
            continue
        for line in message[len(LOG_BEGINS) :].splitlines():
            match = re.match(r"Name: (.*?), LayerType: (\w*), Inputs: (.*)$", line)
            if match:
                inputs, _, rest = match.group(3).partition(", Constants: ")
                outputs = rest.partition(", Outputs: ")[2].partition(", TacticName: ")[0]
                layer: Dict[str, Any] = {"Name": match.group(1), "LayerType": match.group(2)}
                for end, text in (("Inputs", inputs), ("Outputs", outputs)):
                    layer[end] = [{"Datatype": name} for name in re.findall(r"Datatype: (\w[^,}]*)", text)]
                layers.append(layer)
    return layers


def layers_of_network(network: Any) -> List[Layer]:
    """Return the layers of a parsed network, each with the types of its inputs; one fed by DequantizeLinear is Int8.

    Before TensorRT 10 a network does not say which precision it will be computed in: its types are float32 then.
    """
    dequantized = set()
    layers: List[Layer] = []
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        tensors = [layer.get_input(index) for index in range(layer.num_inputs)]
        names = []
        for tensor in tensors:
            if tensor is not None:  # an input that is left out
                names.append("Int8" if tensor.name in dequantized else str(tensor.dtype).rpartition(".")[2])
        kind = str(layer.type).rpartition(".")[2]
        if kind == "DEQUANTIZE":
            dequantized.add(layer.get_output(0).name)
        layers.append(
            {"Name": layer.name, "LayerType": kind, "Inputs": [{"Datatype": name} for name in names[:1]]}
        )
    return layers


def histogram(layers: Sequence[Layer]) -> Dict[str, int]:
    """Return how many layers of each type a network has."""
    counts = Counter(layer["LayerType"] for layer in layers if not isinstance(layer, str))
    return dict(sorted(counts.items()))


def summarize(layers: Sequence[Layer]) -> Dict[str, Any]:
    """Return what a record says of an engine: how many layers per precision, and the shares of the matrix layers."""
    return {
        "layers": count_precisions(layers),
        "shares": {name: round(share, 4) for name, share in precision_shares(layers).items()},
    }
