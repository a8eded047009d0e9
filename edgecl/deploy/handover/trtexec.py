"""trtexec.sh: the net built and timed by NVIDIA's own program."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from edgecl.deploy.contract import render
from edgecl.onboard.trtexec_flags import DURATION_S, MODES, ON_JETSON, lowest_version
from edgecl.storage.directories import Bundle
from edgecl.storage.records import Manifest
from edgecl.storage.writing import write_bytes


def write(bundle: Bundle, manifest: Manifest) -> dict[str, str]:
    """Write the script into a bundle for TensorRT."""
    if manifest.runtime != "tensorrt":
        return {}
    assert manifest.target is not None
    commands = {precision: about.trtexec for precision, about in manifest.precisions.items()}
    text = script(commands, default=manifest.precision, versions=manifest.target["versions"])
    write_bytes(bundle.trtexec_file, text.encode())
    bundle.trtexec_file.chmod(0o755)
    return {bundle.trtexec_file.name: "the net timed by NVIDIA's trtexec: sh trtexec.sh PRECISION"}


def script(commands: Mapping[str, object], *, default: str, versions: str) -> str:
    """Return a shell script that runs the commands, build and bench, of each precision."""
    return render(
        "trtexec.sh.j2",
        commands=commands,
        default=default,
        version=lowest_version(versions),
        mode=MODES[0],
        seconds=f"{DURATION_S:g}",
        trtexec=ON_JETSON,
        quote=shlex.quote,
    )
