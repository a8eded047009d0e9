"""TensorRT on an NVIDIA GPU; the engine is built on the device that runs it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from ..runtime import Runtime, Session

if TYPE_CHECKING:
    from ..device_state import Check

INSTALL = "pip install tensorrt"


def _open(bundle: Path, manifest: Dict[str, Any], **options: Any) -> Session:
    from ..tensorrt_session import TensorrtSession  # NumPy and CUDA

    return TensorrtSession(bundle, manifest, runtime="tensorrt", **options)


def _fix_import(root: Path, jetson: bool) -> str:
    """Return how to get the Python bindings, which JetPack installs for the system's own Python only."""
    bindings = [
        path
        for folder in ("usr/lib", "usr/local/lib")
        for path in root.glob(folder + "/python3*/dist-packages/tensorrt/__init__.py")
    ]
    if bindings and sys.prefix != getattr(sys, "base_prefix", sys.prefix):
        return (
            "the system's python3 has it, this virtual environment does not see it: make it with "
            "`python3 -m venv --system-site-packages DIR`, or use /usr/bin/python3"
        )
    if bindings:
        return "the system's own python3 has it: use /usr/bin/python3"
    libraries = [*root.glob("usr/lib/*/libnvinfer.so*"), *root.glob("usr/local/lib/libnvinfer.so*")]
    if libraries:
        return "sudo apt install python3-libnvinfer  # the library is there, Python's part is not"
    return "sudo apt install nvidia-jetpack" if jetson else INSTALL


def _checks(root: Path, target: Dict[str, Any]) -> "List[Optional[Check]]":
    import shutil

    from ..cuda_checks import check_cuda
    from ..device_state import check

    program = shutil.which("trtexec")
    usual = root / "usr/src/tensorrt/bin/trtexec"
    if program or usual.is_file():
        trtexec = check("trtexec", "ok", program or str(usual))
    else:
        missing = "not found: --runtime trtexec will not work, all else will"
        trtexec = check("trtexec", "warn", missing, "sudo apt install libnvinfer-bin")
    return [*check_cuda(target), trtexec]


RUNTIME = Runtime(
    title="TensorRT",
    module="tensorrt",
    install="on a Jetson: sudo apt install python3-libnvinfer, and use the system's python3; elsewhere: "
    + INSTALL,
    open=_open,
    devices=("gpu", "jetson-*"),
    needs="the TensorRT that came with JetPack",
    builds_engines=True,
    # Source: onnx-tensorrt's branches, docs/operators.md.
    opsets=(((8, 0), 13), ((8, 4), 17), ((9, 0), 19), ((10, 0), 20), ((11, 0), 22)),
    # Source: github.com/NVIDIA/TensorRT, issue 1503.
    bytes_from=(8, 5),
    fix_import=_fix_import,
    checks=_checks,
)
