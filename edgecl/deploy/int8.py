"""A net in fp32 -> the same in INT8, by the ranges of its activations; and the three forms of it.

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
from edgecl.deploy.qdq import CpuWriter, Ranges, TensorrtWriter

Array = NDArray[numpy.float32]


def quantize(
    model: onnx.ModelProto,
    *,
    form: Int8Form,
    ranges: Ranges,
    keep: Collection[str] = (),
    images: Array | None = None,
) -> onnx.ModelProto:
    """Quantize a portable float32 graph.

    Args:
        model: from `edgecl.deploy.graph.portable`; left as it is.
        form: which runtime it is for.
        ranges: tensor -> (least, largest), as `calibrate` measures them on this very graph.
        keep: names of nodes to keep in higher precision, beyond those of `baseline_keep`, which always are.
        images: (N, 3, H, W) after preprocessing; "int8-trt-fp16" needs them, to find what overflows fp16.

    Returns:
        a model that onnx's full check passes, with float32 input and output, and the same bytes each time.
    """
    chosen = set(quantizable(model, form)) - set(keep)
    if form == "int8-cpu":
        # Only HardSigmoid is known below.
        plain = portable(model, opset=opset_of(model), hard_swish="hard_sigmoid")
        kept = {*keep, *first_block(model)}
        quantized = CpuWriter(plain, ranges, chosen=chosen, keep=kept).write()
    else:
        if form == "int8-trt-fp16":
            assert images is not None
            model = half(model, images=images)[0]
        quantized = TensorrtWriter(model, ranges, chosen=chosen, keep=set(keep)).write()
    onnx.checker.check_model(quantized, full_check=True)
    return quantized
