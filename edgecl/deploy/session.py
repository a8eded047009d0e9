"""Run ONNX models on this machine while they are made: the one place of the host that opens a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
        return evaluate(with_any_batch(model).SerializeToString(), form)
    except OnboardError as error:
        raise DeviceError(error.problem, hint=error.hint) from error


def open_ort(model: onnx.ModelProto, *, optimization: str) -> Any:
    """Return ONNX Runtime's session for a model, on one thread: sums keep their order, whatever the machine."""
    return open_model(model.SerializeToString(), threads=1, optimization=optimization)


def open_tensors(
    model: onnx.ModelProto, names: Sequence[str], *, optimization: str
) -> Callable[[Array, int], Iterator[tuple[str, Array]]]:
    """Return a function of images and a batch size that yields the input and the named tensors of every batch."""
    shown = with_any_batch(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = open_ort(shown, optimization=optimization)
    source = model.graph.input[0].name

    def run(images: Array, size: int) -> Iterator[tuple[str, Array]]:
        for start in range(0, len(images), size):
            batch = numpy.ascontiguousarray(images[start : start + size])
            yield source, batch
            yield from zip(names, session.run(names, {source: batch}), strict=True)

    return run


def with_any_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that takes any batch; the portable forms hold no batch but in the input's and output's shape."""
    free = onnx.ModelProto()
    free.CopyFrom(model)
    del free.graph.value_info[:]
    for value in (*free.graph.input, *free.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    return free
