"""Graphs with explicit quantization while they are written: what TensorRT takes, and what ONNX Runtime fuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgecl.deploy.graph import Names
from edgecl.deploy.graph_index import WEIGHTED, GraphIndex, attribute, baseline_keep, clips_at_zero

Array = NDArray[Any]
Ranges = Mapping[str, tuple[float, float]]

_BIAS_STEPS = 2.0**30


class QdqWriter:
    """A quantized graph while it is written, node after node: the chosen nodes in integers, those to keep not."""

    def __init__(self, model: onnx.ModelProto, ranges: Ranges, *, chosen: set[str], keep: set[str]) -> None:
        self.model, self.ranges, self.chosen, self.keep = model, ranges, chosen, keep
        self.links = GraphIndex(model.graph)
        self.names = Names(model.graph)
        self.nodes: list[onnx.NodeProto] = []
        self.constants = dict(self.links.constants)
        self.dequantized: dict[str, str] = {}
        """Tensor -> what its Q/DQ pair gives; one pair serves all readers."""
        self._uncast = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}

    def write(self) -> onnx.ModelProto:
        """Return the quantized model."""
        for node in self.model.graph.node:
            self.write_node(node)
        written = deepcopy(self.model)
        graph = written.graph
        for part in (graph.node, graph.initializer, graph.value_info):
            del part[:]
        graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input}
        graph.initializer.extend(tensor for name, tensor in self.constants.items() if name in read)
        return written

    def write_node(self, node: onnx.NodeProto) -> None:
        """Append what becomes of a node."""
        raise NotImplementedError

    def append(self, kind: str, inputs: Sequence[str], output: str, *, name: str, **attributes: Any) -> str:
        """Append a node of a kind, and return its output."""
        self.nodes.append(
            helper.make_node(kind, list(inputs), [output], name=self.names.new(name), **attributes)
        )
        return output

    def append_with(self, node: onnx.NodeProto, inputs: Mapping[int, str]) -> onnx.NodeProto:
        """Append a copy of a node that reads other tensors at some places."""
        changed = deepcopy(node)
        for place, name in inputs.items():
            changed.input[place] = name
        self.nodes.append(changed)
        return changed

    def constant(self, wish: str, values: Array) -> str:
        """Add a constant under a new name."""
        name = self.names.new(wish)
        self.constants[name] = numpy_helper.from_array(numpy.asarray(values), name)
        return name

    def values(self, name: str) -> Array:
        """Return a constant's values."""
        return numpy_helper.to_array(self.constants[name])

    def range_of(self, tensor: str) -> tuple[float, float]:
        """Return a tensor's range; a cast changes the type and not the values."""
        return self.ranges[self._uncast.get(tensor, tensor)]

    def pair(
        self, tensor: str, scale: Array, zero: Array, *, wish: str, back: str = "", **attributes: int
    ) -> str:
        """Append QuantizeLinear and DequantizeLinear behind a tensor; it may come back with another scale."""
        names = [self.constant(f"{wish}_scale", scale), self.constant(f"{wish}_zero_point", zero)]
        codes = self.append(
            "QuantizeLinear",
            [tensor, *names],
            self.names.new(f"{tensor}_quantized"),
            name=f"{tensor}_QuantizeLinear",
            **attributes,
        )
        return self.append(
            "DequantizeLinear",
            [codes, back or names[0], names[1]],
            self.names.new(f"{tensor}_dequantized"),
            name=f"{tensor}_DequantizeLinear",
            **attributes,
        )


class TensorrtWriter(QdqWriter):
    """Symmetric S8 on inputs only; the scales have the type of what they scale."""

    def write_node(self, node: onnx.NodeProto) -> None:
        """Put pairs before a convolution or matrix product, and before the skip of a residual sum."""
        changed: dict[int, str] = {}
        skip = None if node.name in self.keep else self.links.skip_input(node, self.chosen)
        if node.name in self.chosen:
            dtype = self.values(node.input[1]).dtype
            changed = {0: self._activation(node.input[0], dtype), 1: self._weights(node)}
        elif skip is not None:
            # The sum has the type of the convolution that it is fused into.
            fused = self.links.maker[node.input[1 - skip]]
            changed = {skip: self._activation(node.input[skip], self.values(fused.input[1]).dtype)}
        self.append_with(node, changed)

    def _activation(self, tensor: str, dtype: Any) -> str:
        if tensor not in self.dequantized:
            scale = symmetric_scale(*self.range_of(tensor), dtype=dtype)
            zero = numpy.zeros((), numpy.int8)
            self.dequantized[tensor] = self.pair(tensor, scale, zero, wish=tensor)
        return self.dequantized[tensor]

    def _weights(self, node: onnx.NodeProto) -> str:
        tensor, axis = node.input[1], _channel_axis(node)
        # The same weights as rows of one node and columns of another have two sets of scales.
        key = f"{tensor}:{axis}"
        if key not in self.dequantized:
            weights = self.values(tensor)
            scale = weight_scales(weights, axis=axis, dtype=weights.dtype)
            zero = numpy.zeros(scale.shape, numpy.int8)
            self.dequantized[key] = self.pair(tensor, scale, zero, wish=tensor, axis=axis)
        return self.dequantized[key]


class CpuWriter(QdqWriter):
    """Asymmetric U8 activations on both sides of every operator that ONNX Runtime has an integer kernel for."""

    def __init__(self, model: onnx.ModelProto, ranges: Ranges, *, chosen: set[str], keep: set[str]) -> None:
        super().__init__(model, ranges, chosen=chosen, keep=keep)
        self._grid: dict[str, tuple[Array, Array]] = {}
        """Tensor -> its scale and zero point."""
        self._integer: set[str] = set()
        """Tensors that an integer kernel makes."""
        self._absorbed: set[str] = set()
        """Outputs of activations that saturation computes."""
        self._entrances = set(baseline_keep(model, "int8-cpu")) - keep

    def write_node(self, node: onnx.NodeProto) -> None:
        """Append a node between pairs where it has an integer kernel and integer inputs, else as it is."""
        if node.output[0] in self._absorbed:
            return
        kind, inside = node.op_type, [name in self._integer for name in self.links.activations(node)]
        if node.name in self.chosen and kind == "Conv":
            self._finish(node, self._weighted(node))
        elif node.name in self.chosen:
            # The classifier's outputs are ranked: there is nothing to gain from rounding them.
            self._weighted(node)
        elif node.name in self._entrances and self._leads_to_chosen(node):
            self._finish(node, self._leave(node))
        elif node.name in self.keep or not any(inside):
            self._leave(node)
        elif kind == "HardSigmoid" and attribute(node, "alpha", 0.2) > 0:
            self._write_hard_sigmoid(node)
        elif (kind == "Add" and all(inside)) or kind == "Mul":
            self._finish(node, self.append_with(node, self._operands(node)))
        elif kind == "Sigmoid" or (
            kind in ("GlobalAveragePool", "AveragePool") and self._read_by_nodes(node)
        ):
            self._finish(node, self.append_with(node, {0: self._activation(node.input[0])}))
        elif kind == "MaxPool" or (kind == "Flatten" and self._read_by_chosen(node)):
            self._grid[node.output[0]] = self._grid_of(node.input[0])
            self._finish(node, self.append_with(node, {0: self._activation(node.input[0])}))
        else:
            self._leave(node)

    def _leave(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Append a node in float32; it reads what integer kernels made after the pair, so that they can be fused."""
        inputs = enumerate(node.input)
        return self.append_with(
            node, {place: self._activation(name) for place, name in inputs if name in self._integer}
        )

    def _finish(self, node: onnx.NodeProto, written: onnx.NodeProto) -> None:
        """Quantize the output of a node, and leave a clip out that saturation computes."""
        tensor, outputs = node.output[0], self.links.outputs
        readers = self.links.readers[tensor]
        if tensor in outputs:
            return
        if len(readers) == 1 and clips_at_zero(readers[0], self.constants):
            # The end of the net is not quantized: nothing saturates there.
            if readers[0].output[0] in outputs:
                return
            tensor = readers[0].output[0]
            self._absorbed.add(tensor)
            written.output[0] = tensor
        self._activation(tensor)
        self._integer.add(tensor)

    def _read_by_nodes(self, node: onnx.NodeProto) -> bool:
        """Return whether anything but the end of the net reads a pool: features are not to be rounded twice."""
        readers = self.links.readers[node.output[0]]
        return any(reader.op_type != "Flatten" or self._read_by_chosen(reader) for reader in readers)

    def _read_by_chosen(self, node: onnx.NodeProto) -> bool:
        return any(reader.name in self.chosen for reader in self.links.readers[node.output[0]])

    def _leads_to_chosen(self, node: onnx.NodeProto) -> bool:
        """Return whether one of the next weighted nodes is quantized."""
        seen: set[str] = set()
        ahead = list(node.output)
        while ahead:
            for reader in self.links.readers[ahead.pop()]:
                if reader.name in self.chosen:
                    return True
                if reader.op_type not in WEIGHTED and reader.name not in seen:
                    seen.add(reader.name)
                    ahead += reader.output
        return False

    def _grid_of(self, tensor: str) -> tuple[Array, Array]:
        if tensor not in self._grid:
            least, largest = self.range_of(tensor)
            maker = self.links.maker.get(tensor)
            if maker is not None and clips_at_zero(maker, self.constants):
                least = 0.0
            self._grid[tensor] = asymmetric_scale(least, largest)
        return self._grid[tensor]

    def _activation(self, tensor: str) -> str:
        if tensor not in self.dequantized:
            self.dequantized[tensor] = self.pair(tensor, *self._grid_of(tensor), wish=tensor)
        return self.dequantized[tensor]

    def _weighted(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Append a convolution or matrix product with S8 weights and an int32 bias."""
        tensor, axis = node.input[1], _channel_axis(node)
        weights = self.values(tensor).astype(numpy.float64)
        step = float(self._grid_of(node.input[0])[0])
        biased = len(node.input) > 2 and bool(node.input[2])
        bias = self.values(node.input[2]).astype(numpy.float64).reshape(-1) if biased else None
        # The kernels of depthwise convolutions multiply in 16 bits and lose nothing; all others are matrix products.
        scales_of = weight_scales if _is_depthwise(node, weights) else paired_weight_scales
        scale = scales_of(weights, axis=axis)
        if bias is not None:
            # A bias far larger than the weights of its channel must still fit into int32.
            scale = representable(numpy.maximum(scale, numpy.abs(bias) / (step * _BIAS_STEPS)), numpy.float32)
        shape = [-1 if place == axis else 1 for place in range(weights.ndim)]
        # Without -128, two of which beside each other overflow on Arm without dot products.
        codes = numpy.clip(numpy.rint(weights / scale.astype(numpy.float64).reshape(shape)), -127, 127)
        wish = f"{node.name}_weight"
        changed = {
            0: self._activation(node.input[0]),
            1: self._constant_codes(wish, codes.astype(numpy.int8), scale, axis=axis),
        }
        if bias is not None:
            bias_scale = (numpy.float32(step) * scale).astype(numpy.float32)
            steps = numpy.rint(bias / bias_scale.astype(numpy.float64)).astype(numpy.int32)
            changed[2] = self._constant_codes(f"{node.name}_bias", steps, bias_scale, axis=0)
        return self.append_with(node, changed)

    def _constant_codes(
        self, wish: str, codes: Array, scale: Array, zero: Array | None = None, **attributes: int
    ) -> str:
        """Add integers and the DequantizeLinear that reads them."""
        if zero is None:
            zero = numpy.zeros(scale.shape, codes.dtype)
        return self.append(
            "DequantizeLinear",
            [
                self.constant(f"{wish}_quantized", codes),
                self.constant(f"{wish}_scale", scale),
                self.constant(f"{wish}_zero_point", zero),
            ],
            self.names.new(f"{wish}_dequantized"),
            name=f"{wish}_DequantizeLinear",
            **attributes,
        )

    def _operands(self, node: onnx.NodeProto) -> dict[int, str]:
        """Return the quantized operands of a sum or product; a constant is exact as one step of its own size."""
        changed = {}
        for place, name in enumerate(node.input):
            if name not in self.constants:
                changed[place] = self._activation(name)
                continue
            scale, zero = asymmetric_scale(float(self.values(name).min()), float(self.values(name).max()))
            codes = numpy.clip(numpy.rint(self.values(name) / scale) + zero, 0, 255).astype(numpy.uint8)
            wish = self.names.new(f"{node.output[0]}_operand")
            changed[place] = self._constant_codes(wish, codes, scale, zero)
        return changed

    def _write_hard_sigmoid(self, node: onnx.NodeProto) -> None:
        """Write clip(alpha x + beta, 0, 1) as one integer sum.

        It is alpha clip(x + beta / alpha, 0, 1 / alpha): saturation does the clip, and coming back from integers with
        another scale than going there does the product with alpha.
        """
        alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
        tensor = node.output[0]
        offset = self._constant_codes(
            f"{tensor}_offset", numpy.asarray(1, numpy.uint8), numpy.asarray(beta / alpha, numpy.float32)
        )
        lifted = self.append(
            "Add",
            [self._activation(node.input[0]), offset],
            self.names.new(f"{tensor}_lifted"),
            name=node.name,
        )
        self.dequantized[tensor] = self.pair(
            lifted,
            numpy.asarray(1 / alpha / 255, numpy.float32),
            numpy.zeros((), numpy.uint8),
            wish=tensor,
            back=self.constant(f"{tensor}_unit_scale", numpy.asarray(1 / 255, numpy.float32)),
        )
        self._integer.add(tensor)


def _channel_axis(node: onnx.NodeProto) -> int:
    """Return the axis of a node's weights that counts its outputs."""
    return 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1


def _is_depthwise(node: onnx.NodeProto, weights: Array) -> bool:
    """Return whether every channel is convolved alone, into one."""
    groups = int(attribute(node, "group", 1))
    return groups > 1 and weights.shape[:2] == (groups, 1)


# --- scales and zero points ---

_LEAST_SCALE = {numpy.dtype(numpy.float32): 2.0**-100, numpy.dtype(numpy.float16): 2.0**-20}
"""Smaller scales lose their digits or become zero, which no runtime takes."""


def symmetric_scale(least: float, largest: float, *, dtype: Any = numpy.float32) -> Array:
    """Return the scale of S8 with zero point 0: () of dtype, positive; 127 steps reach the larger end."""
    reach = max(abs(least), abs(largest))
    return representable(numpy.asarray((reach or 1.0) / 127), dtype)


def asymmetric_scale(least: float, largest: float) -> tuple[Array, Array]:
    """Return scale and zero point of U8: () float32, positive, and () uint8; zero is always in the range."""
    least, largest = min(least, 0.0), max(largest, 0.0)
    scale = representable(numpy.asarray(((largest - least) or 1.0) / 255), numpy.float32)
    zero = numpy.clip(numpy.rint(-least / float(scale)), 0, 255)
    return scale, numpy.asarray(zero, numpy.uint8)


def weight_scales(weights: Array, *, axis: int, dtype: Any = numpy.float32) -> Array:
    """Return the S8 scale of every output channel: (O,) of dtype, positive, 1/127 for a channel of zeros."""
    reach = numpy.abs(weights.astype(numpy.float64)).max(
        axis=tuple(other for other in range(weights.ndim) if other != axis)
    )
    return representable(numpy.where(reach > 0, reach, 1.0) / 127, dtype)


def paired_weight_scales(weights: Array, *, axis: int) -> Array:
    """Return the S8 scale of every output channel at which sums of two products with U8 fit into 16 bits.

    x86-64 without VNNI multiplies two neighbors at once and adds them with saturation (`vpmaddubsw`). No such sum
    saturates where no two weights of a channel that have the same sign exceed 128 steps together: 128 * 255 < 2**15.
    Which weights are neighbors is the kernel's choice, so the two largest decide.

    Returns:
        (O,) float32, positive; from `weight_scales` up to about twice that.
    """
    single = weight_scales(weights, axis=axis)
    channels = numpy.moveaxis(weights.astype(numpy.float64), axis, 0).reshape(weights.shape[axis], -1)
    if channels.shape[1] < 2:
        return single
    ends = [numpy.partition(numpy.maximum(sign * channels, 0), -2, axis=1)[:, -2:].sum(1) for sign in (1, -1)]
    return numpy.maximum(single, representable(numpy.maximum(*ends) / 128, numpy.float32))


def representable(scale: Array, dtype: Any) -> Array:
    """Round a scale up to the next number of a type, so that the largest value is not clipped."""
    dtype = numpy.dtype(dtype)
    rounded = scale.astype(dtype)
    rounded = numpy.where(
        rounded.astype(numpy.float64) < scale, numpy.nextafter(rounded, dtype.type(numpy.inf)), rounded
    )
    return numpy.asarray(numpy.maximum(rounded, dtype.type(_LEAST_SCALE[dtype])), dtype)
