"""What a bundle holds for one runtime alone: commands, scripts, engines compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgecl.config.target import Target
from edgecl.deploy.rtx import compile_rtx
from edgecl.errors import TargetError
from edgecl.onboard import trtexec
from edgecl.onboard.bundle import engine_name
from edgecl.onboard.errors import OnboardError
from edgecl.storage.artifacts import Bundle, write_bytes

Json = dict[str, Any]


def _trtexec_commands(file: Path, precision: str, form: str, target: Target, input_form: Json) -> Json:
    try:
        commands = trtexec.command_lines(
            target.versions,
            manifest_input=input_form,
            build=target.build.model_dump(mode="json"),
            precision=precision,
            form=form,
            model=file.name,
            plan=engine_name(precision, "trtexec"),
        )
    except OnboardError as error:
        raise TargetError(error.problem, hint=error.hint) from error
    return {"trtexec": commands}


def _rtx_engine(file: Path, precision: str, form: str, target: Target, input_form: Json) -> Json:
    plan = file.with_name(engine_name(precision, "rtx"))
    engine = compile_rtx(
        file, plan, precision=precision, form=form, build=target.build, input_form=input_form
    )
    return {"engines": {plan.name: engine}}


def _trtexec_script(bundle: Bundle, manifest: Json) -> None:
    write_bytes(bundle.trtexec_file, trtexec.script(manifest).encode())
    bundle.trtexec_file.chmod(0o755)


OF_PRECISION: dict[str, Callable[[Path, str, str, Target, Json], Json]] = {
    "tensorrt": _trtexec_commands,
    "tensorrt_rtx": _rtx_engine,
}
"""Runtime -> (ONNX file, precision, form, target, the manifest's input) -> more for the manifest's precision."""

OF_BUNDLE: dict[str, Callable[[Bundle, Json], None]] = {"tensorrt": _trtexec_script}
"""Runtime -> writes more files into a bundle."""
