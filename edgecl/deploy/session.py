"""Run ONNX models on this machine while they are made: the one place of the host that opens a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    Args:
        model: in any form.
        runtime: runs it where it can on this machine; ONNX Runtime stands in for the others.
        form: of the model, which decides how it is optimized.

    Raises:
        DeviceError: the runtime is not installed.
    """
    evaluate = RUNTIMES[runtime].evaluate or RUNTIMES["onnxruntime"].evaluate
    assert evaluate is not None
    try:
        run = evaluate(with_any_batch(model).SerializeToString(), form)
    except OnboardError as error:
        raise DeviceError(error.problem, hint=error.hint) from error
    return lambda images: run_in_parts(lambda part: [run(part)], images, fixed_batch(model))[0]


def open_ort(model: onnx.ModelProto, *, optimization: str) -> Any:
    """Return ONNX Runtime's session for a model, on one thread: sums keep their order, whatever the machine."""
    return open_model(model.SerializeToString(), threads=1, optimization=optimization)


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """Return the batch that the shapes inside a graph are made for, as those of attention are; None where any will do."""
    reshapes = any(node.op_type in ("Reshape", "Expand") for node in model.graph.node)
    return (model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None) if reshapes else None


def run_in_parts(
    run: Callable[[Array], Sequence[Array]], images: Array, batch: int | None
) -> list[NDArray[Any]]:
    """Run all images at once, or so many at a time, the last ones beside copies that fill the batch."""
    if batch is None:
        return list(run(images))
    found = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        filled = numpy.concatenate([part, numpy.repeat(part[-1:], batch - len(part), axis=0)])
        found.append([values[: len(part)] for values in run(filled)])
    return [numpy.concatenate(values) for values in zip(*found, strict=True)]


def with_any_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that takes any batch, but where `fixed_batch` gives one."""
    free = onnx.ModelProto()
    free.CopyFrom(model)
    del free.graph.value_info[:]
    for value in (*free.graph.input, *free.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    return free
