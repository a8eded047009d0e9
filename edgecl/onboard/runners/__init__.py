"""One file per runtime; each holds a runner, which is all that verifying and measuring know of a runtime.

A runner is made from a model file, its manifest and a number of threads, and has
    run(images)      (N, C, H, W) float32 -> outputs (N, F); N is the manifest's batch unless that is dynamic
    bind(images)     keep a batch ready to be timed
    run_once()       one inference on it, done when it returns
    describe()       what runs, for the record: runtime, precision, threads, versions, settings
"""

from pathlib import Path
from typing import Any, Dict, Union

from ..errors import DeviceError
from .ort import OrtRunner

Runner = OrtRunner  # a Union once there is a second


def open_runner(bundle: Union[str, Path], manifest: Dict[str, Any], *, threads: int) -> Runner:
    """Load a bundle's model with the runtime its manifest names.

    Raises:
        DeviceError: no runner for that runtime, it is not installed, or it cannot load the model.
        BundleError: the model is not the one of the manifest.
    """
    if manifest["runtime"] != OrtRunner.RUNTIME:
        raise DeviceError(
            "no runner for the runtime '%s'; this edgecl has: %s" % (manifest["runtime"], OrtRunner.RUNTIME),
            "use the runner that came with the bundle, or a newer edgecl",
        )
    return OrtRunner(Path(bundle) / manifest["model"], manifest, threads=threads)
