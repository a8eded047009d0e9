"""The runtimes, one file each, found by listing this folder; every file holds one record, `RUNTIME`."""

import importlib
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from ..bundle import choose_precision
from ..errors import BundleError, DeviceError
from ..runtime import Report, Runtime, Session


def _names() -> List[str]:
    folder = Path(__path__[0])
    if folder.is_dir():
        return sorted(file.stem for file in folder.glob("[!_]*.py"))
    import pkgutil  # in onboard.pyz; it loads slowly

    return sorted(found.name for found in pkgutil.iter_modules(__path__))


RUNTIMES: Dict[str, Runtime] = {
    name: importlib.import_module("." + name, __name__).RUNTIME for name in _names()
}
"""Name -> record. NumPy and the runtimes themselves are imported when a session is opened."""

TRTEXEC = "trtexec"
"""NVIDIA's program, by which `bench` can time a bundle for TensorRT; it gives no outputs, so it is no runtime."""


def full_name(name: str) -> str:
    """Return a runtime's name as manifests and records spell it: 'onnxruntime' for 'ort'."""
    return next((full for full, runtime in RUNTIMES.items() if name == runtime.alias), name)


def option_names() -> List[str]:
    """Return every name that `--runtime` takes."""
    return [name for full, runtime in RUNTIMES.items() for name in (runtime.alias, full) if name]


def list_runtimes() -> List[Dict[str, str]]:
    """List the runtimes: name and summary."""
    return [
        {
            "name": name + (" (%s)" % runtime.alias if runtime.alias else ""),
            "summary": "%s on %s; %s" % (runtime.title, " and ".join(runtime.devices), runtime.install),
        }
        for name, runtime in RUNTIMES.items()
    ]


def open_session(
    bundle: Union[str, Path],
    manifest: Dict[str, Any],
    *,
    precision: Optional[str] = None,
    runtime: Optional[str] = None,
    threads: int,
    report: Optional[Report] = None,
) -> Session:
    """Load the net of a bundle, whose files are checked, in a precision; the manifest's own and its runtime where None.

    Raises:
        DeviceError: no such runtime, it is not installed, or it cannot load the net.
        BundleError: no such precision, or the file is none that the runtime loads, or not the manifest's net.
    """
    name = full_name(runtime or manifest["runtime"])
    if name not in RUNTIMES:
        raise DeviceError(
            "no session for the runtime '%s'; this edgecl has: %s" % (name, ", ".join(RUNTIMES)),
            "use the onboard.pyz that came with the bundle, or a newer edgecl",
        )
    precision, about = choose_precision(manifest, precision)
    if not about["model"].endswith(".onnx"):
        raise BundleError("'%s' is no *.onnx file" % about["model"])
    return RUNTIMES[name].open(Path(bundle), manifest, precision=precision, threads=threads, report=report)
