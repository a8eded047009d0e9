"""A float32 graph and the ranges of its activations -> the same graph with explicit INT8, in three forms.

`int8-trt` is what TensorRT takes: symmetric S8 Q/DQ pairs on the inputs of convolutions, on float32 weights, and on the
skip input of a residual sum, whose other side is fused into the convolution that makes it. `int8-trt-fp16` is the same
with fp16 scales and the rest in fp16, for strongly typed networks, which would run the rest in fp32 otherwise.
`int8-cpu` is what ONNX Runtime fuses: asymmetric U8 activations, S8 weights, int32 biases, and Q/DQ behind every
operator that has an integer kernel. Its weights leave room for the 16-bit sums of processors without VNNI, so that
all processors compute the same. The first two exclude the last: TensorRT refuses U8 and int32, and ONNX Runtime
fuses nothing in a graph without quantized outputs.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy
import onnx
from numpy.typing import NDArray

from edgecl.config.target import Int8Form
from edgecl.deploy.fp16 import half
from edgecl.deploy.graph import opset_of, portable
from edgecl.deploy.graph_index import first_block, quantizable
from edgecl.deploy.qdq import CpuDraft, Ranges, TensorrtDraft
from edgecl.errors import DataError, TargetError, near_matches

_HALF_LIMIT = 6e4


def quantize(
    model: onnx.ModelProto,
    *,
    form: Int8Form,
    ranges: Ranges,
    keep: Collection[str] = (),
    images: NDArray[numpy.float32] | None = None,
) -> onnx.ModelProto:
    """Quantize a portable float32 graph.

    Args:
        model: from `edgecl.deploy.graph.portable`; left as it is.
        form: which runtime it is for.
        ranges: tensor -> (least, largest), as `calibrate` measures them on this very graph.
        keep: names of nodes to keep in higher precision, beyond those of `baseline_keep`, which always are.
        images: (N, 3, H, W) after preprocessing; only "int8-trt-fp16" reads them, to find what overflows fp16, and
            needs them only where the ranges come near its limit.

    Returns:
        a model that onnx's full check passes, with float32 input and output, and the same bytes each time.

    Raises:
        DataError: a tensor to quantize has no range, or one that is not finite.
        TargetError: a name to keep is not in the graph, or the opset is too old for the form.
    """
    names = {node.name for node in model.graph.node}
    for name in keep:
        if name not in names:
            raise TargetError(
                f"there is no node '{name}' to keep in higher precision", hint=near_matches(name, names)
            )
    least = 19 if form == "int8-trt-fp16" else 13
    if opset_of(model) < least:
        raise TargetError(
            f"'{form}' needs opset {least}, the graph has {opset_of(model)}",
            hint=f"set [graph] opset = {least} or later in the target",
        )
    chosen = set(quantizable(model, form)) - set(keep)
    if form == "int8-cpu":
        # Only HardSigmoid is known below.
        plain = portable(model, opset=opset_of(model), hard_swish="hard_sigmoid")
        kept = {*keep, *first_block(model)}
        quantized = CpuDraft(plain, ranges, chosen=chosen, keep=kept).write()
    else:
        source = _in_half(model, ranges, images) if form == "int8-trt-fp16" else model
        quantized = TensorrtDraft(source, ranges, chosen=chosen, keep=set(keep)).write()
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def _in_half(
    model: onnx.ModelProto, ranges: Ranges, images: NDArray[numpy.float32] | None
) -> onnx.ModelProto:
    """Convert a graph to fp16, with what overflows there in fp32."""
    if images is None:
        for name, ends in ranges.items():
            if max(map(abs, ends)) > _HALF_LIMIT:
                raise DataError(
                    f"tensor '{name}' reaches {max(map(abs, ends)):.3g}, which fp16 may not hold",
                    hint="give images, so that the nodes around it can be kept in fp32",
                )
        # No activation comes near the limit; what is left to look at are the weights.
        sides = [side.dim_value or 1 for side in model.graph.input[0].type.tensor_type.shape.dim]
        images = numpy.zeros(sides, numpy.float32)
    return half(model, images=images, limit=_HALF_LIMIT)[0]
