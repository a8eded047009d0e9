"""trtexec.sh: the net built and timed by NVIDIA's own program."""

from __future__ import annotations

from edgecl.onboard import trtexec_flags
from edgecl.storage.directories import Bundle
from edgecl.storage.records import Manifest
from edgecl.storage.writing import write_bytes


def write(bundle: Bundle, manifest: Manifest) -> dict[str, str]:
    """Write the script into a bundle for TensorRT."""
    if manifest.runtime != "tensorrt":
        return {}
    write_bytes(bundle.trtexec_file, trtexec_flags.script(manifest.to_json()).encode())
    bundle.trtexec_file.chmod(0o755)
    return {bundle.trtexec_file.name: "the net timed by NVIDIA's trtexec: sh trtexec.sh PRECISION"}
