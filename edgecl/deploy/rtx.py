"""Compile an ONNX file with TensorRT for RTX, ahead of time and without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgecl.config.target import Build
from edgecl.errors import DeviceError
from edgecl.onboard.engine import build_plan, import_runtime
from edgecl.onboard.errors import OnboardError
from edgecl.onboard.layers import summarize

RUNTIME = "tensorrt_rtx"


def compile_rtx(
    onnx_file: Path, out: Path, *, precision: str, form: str, build: Build, input_form: dict[str, Any]
) -> dict[str, Any]:
    """Write one plan that holds the net for every compute capability the target names.

    Returns:
        what the manifest's `engines` holds of it; `layers` counts the parsed network's by type, `engine` how many of the
        compiled ones compute in each precision.

    Raises:
        DeviceError: TensorRT for RTX is not installed, refuses the graph, or would not compute in the precision
            that was asked for.
    """
    try:
        trt = import_runtime(RUNTIME)
        built = build_plan(
            onnx_file,
            runtime=RUNTIME,
            precision=precision,
            form=form,
            build=build.model_dump(mode="json"),
            input_form=input_form,
        )
    except OnboardError as error:
        raise DeviceError(error.problem, where={"net": onnx_file}, hint=error.hint) from error
    out.write_bytes(built.plan)
    return {
        "version": trt.__version__,
        "compute_capabilities": built.settings["compute_capabilities"],
        "compile_s": round(built.seconds, 3),
        "size_bytes": len(built.plan),
        "io": {**built.network["inputs"], **built.network["outputs"]},
        "layers": built.network["layers"],
        "engine": summarize(built.layers) if built.layers else None,
        "settings": built.settings,
        "warnings": built.warnings,
    }
