"""What a precision of a bundle holds for one runtime alone: commands, engines compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgecl.config.target import Target
from edgecl.deploy.rtx import compile_rtx
from edgecl.errors import TargetError
from edgecl.onboard import trtexec_flags
from edgecl.onboard.bundle import engine_name
from edgecl.onboard.errors import OnboardError
from edgecl.storage.records import Manifest


def _trtexec_commands(file: Path, precision: str, manifest: Manifest, target: Target) -> None:
    about, build = manifest.precisions[precision], target.build.model_dump(mode="json")
    net = trtexec_flags.Net(manifest.input.to_json(), build, precision, about.form, file.name)
    try:
        about.trtexec = trtexec_flags.command_lines(target.versions, net, engine_name(precision, "trtexec"))
    except OnboardError as error:
        raise TargetError(error.problem, hint=error.hint) from error


def _rtx_engine(file: Path, precision: str, manifest: Manifest, target: Target) -> None:
    about, plan = manifest.precisions[precision], file.with_name(engine_name(precision, "rtx"))
    about.engines = {
        plan.name: compile_rtx(
            file,
            plan,
            precision=precision,
            form=about.form,
            build=target.build,
            input_form=manifest.input.to_json(),
        )
    }


OF_PRECISION: dict[str, Callable[[Path, str, Manifest, Target], None]] = {
    "tensorrt": _trtexec_commands,
    "tensorrt_rtx": _rtx_engine,
}
"""Runtime -> (ONNX file, precision, manifest, target): adds to the manifest's precision, and files beside the ONNX file."""
