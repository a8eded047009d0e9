"""One file per runtime; each holds a session, which is all that verifying and measuring know of a runtime.

A session is made from a bundle, its manifest, a precision and a number of threads, and has
    run(images)      (N, C, H, W) float32 -> outputs (N, F) float32; N is the manifest's batch unless that is dynamic
    bind(images)     keep a batch ready to be timed
    modes()          what can be timed, the headline first: 'inference' on a processor
    run_once(mode)   one inference on the bound batch, done when it returns; seconds as the device measured them,
                     or None where the call itself is to be timed
    describe()       what runs, for the record: runtime, precision, threads, versions, settings, engine
    close()          let go of the device's memory
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Union

import numpy as np

from ..bundle import choose_precision
from ..errors import DeviceError
from ..onnx_file import check_self_contained

if TYPE_CHECKING:  # no Protocol before Python 3.8
    from typing import Protocol

    class Session(Protocol):
        """What the module says."""

        def run(self, images: np.ndarray) -> np.ndarray: ...  # noqa: D102
        def bind(self, images: np.ndarray) -> None: ...  # noqa: D102
        def modes(self) -> List[str]: ...  # noqa: D102
        def run_once(self, mode: str) -> Optional[float]: ...  # noqa: D102
        def describe(self) -> Dict[str, Any]: ...  # noqa: D102
        def close(self) -> None: ...  # noqa: D102

else:
    Session = Any

RUNTIMES = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")
SHORT_NAMES = {"ort": "onnxruntime"}


def full_name(runtime: str) -> str:
    """Return a runtime's name as manifests and records spell it: 'onnxruntime' for 'ort'."""
    return SHORT_NAMES.get(runtime, runtime)


def open_session(
    bundle: Union[str, Path],
    manifest: Dict[str, Any],
    *,
    precision: Optional[str] = None,
    runtime: Optional[str] = None,
    threads: int,
    report: Optional[Callable[[str], None]] = None,
) -> Session:
    """Load the net of a bundle in a precision.

    Args:
        bundle: the directory.
        manifest: of that bundle.
        precision: the bundle's default where None.
        runtime: one of RUNTIMES or 'ort'; the manifest's where None.
        threads: to compute with, on a processor.
        report: called with a line when an engine is built for this device, which takes minutes.

    Raises:
        DeviceError: no session for that runtime, it is not installed, or it cannot load the net.
        BundleError: no such precision, the net is not the one of the manifest, or keeps weights outside its file.
    """
    name = full_name(runtime or manifest["runtime"])
    if name not in RUNTIMES:
        raise DeviceError(
            "no session for the runtime '%s'; this edgecl has: %s" % (name, ", ".join(RUNTIMES)),
            "use the onboard.pyz that came with the bundle, or a newer edgecl",
        )
    precision, about = choose_precision(manifest, precision)
    bundle = Path(bundle)
    check_self_contained(bundle / about["model"])
    # A session's file is read only for its runtime: a board has one of them.
    if name == "onnxruntime":
        from .ort import OrtSession

        return OrtSession(bundle, manifest, precision=precision, threads=threads)
    if name == "openvino":
        from .openvino import OpenvinoSession

        return OpenvinoSession(bundle, manifest, precision=precision, threads=threads)
    from .tensorrt import TensorrtSession

    return TensorrtSession(
        bundle, manifest, precision=precision, threads=threads, runtime=name, report=report
    )
