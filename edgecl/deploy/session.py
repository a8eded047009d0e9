"""Run ONNX models on this machine while they are made: the one place of the host that opens a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy

import numpy
import onnx
from numpy.typing import NDArray

from edgecl.errors import DeviceError
from edgecl.onboard.errors import OnboardError
from edgecl.onboard.runtimes import RUNTIMES
from edgecl.onboard.runtimes.onnxruntime import open_model

Array = NDArray[numpy.float32]
Run = Callable[[Array], Array]


def session_of(model: onnx.ModelProto, *, runtime: str, form: str = "fp32") -> Run:
    """Return a function that runs a model on any batch, on one thread.

    The runtime runs it where it can on this machine, else ONNX Runtime; the model's form decides how it is optimized.

    Raises:
        DeviceError: the runtime is not installed.
    """
    evaluate = RUNTIMES[runtime].evaluate or RUNTIMES["onnxruntime"].evaluate
    assert evaluate is not None
    try:
        run = evaluate(with_any_batch(model).SerializeToString(), form)
    except OnboardError as error:
        raise DeviceError(error.problem, hint=error.hint) from error
    fixed = _fixed_batch(model)
    return lambda images: numpy.concatenate(
        [
            run(batch)[:count]
            for batch, count in _batches(images, fixed or len(images), fill=fixed is not None)
        ]
    )


def open_tensors(
    model: onnx.ModelProto, names: Sequence[str], *, optimization: str
) -> Callable[[Array, int], Iterator[tuple[str, Array]]]:
    """Return a function of images and a batch size that yields the input and the named tensors of every batch."""
    shown = with_any_batch(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    # On one thread sums keep their order, whatever the machine.
    session = open_model(shown.SerializeToString(), threads=1, optimization=optimization)
    source, fixed = model.graph.input[0].name, _fixed_batch(model)

    def run(images: Array, size: int) -> Iterator[tuple[str, Array]]:
        for batch, count in _batches(images, fixed or size, fill=fixed is not None):
            yield source, batch[:count]
            for name, values in zip(names, session.run(names, {source: batch}), strict=True):
                yield name, values[:count]

    return run


def _batches(images: Array, size: int, *, fill: bool) -> Iterator[tuple[Array, int]]:
    """Yield batches and how many of their images count: copies of the last one fill up the last batch, if they are to."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        missing = size - len(part) if fill else 0
        yield numpy.ascontiguousarray(numpy.concatenate([part, *[part[-1:]] * missing])), len(part)


def _fixed_batch(model: onnx.ModelProto) -> int | None:
    """Return the batch that the shapes inside a graph are made for, as those of attention are; None where any will do."""
    reshapes = any(node.op_type in ("Reshape", "Expand") for node in model.graph.node)
    return (model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None) if reshapes else None


def with_any_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that takes any batch, but where `fixed_batch` gives one."""
    free = deepcopy(model)
    del free.graph.value_info[:]
    for value in (*free.graph.input, *free.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    return free
