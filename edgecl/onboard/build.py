"""Build the engines of a bundle on this device."""

from contextlib import closing
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

from .bundle import check_files, choose_precision, read_manifest
from .errors import BundleError
from .runtime import Report
from .runtimes import RUNTIMES, open_session


def build(
    bundle: Union[str, Path],
    *,
    precisions: Optional[Sequence[str]] = None,
    report: Optional[Report] = None,
) -> Dict[str, Any]:
    """Build the engines of a bundle on this device, to be found by whatever runs it afterwards.

    Returns:
        runtime; precisions, for each what the session says of its engine: file, sha256, layers, build_s, cached.

    Raises:
        BundleError: a file is missing or changed, or the bundle is for another runtime.
        DeviceError: no TensorRT, no GPU, or it cannot build the engine.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    runtime = RUNTIMES.get(manifest["runtime"])
    if runtime is None or not runtime.builds_engines:
        raise BundleError(
            "the bundle is for '%s': there is no engine to build" % manifest["runtime"],
            "run it as it is, or export one with --target jetson",
        )
    chosen = [choose_precision(manifest, name)[0] for name in precisions or list(manifest["precisions"])]
    record: Dict[str, Any] = {"ok": True, "precisions": {}}
    for precision in chosen:
        with closing(
            open_session(bundle, manifest, precision=precision, threads=1, report=report)
        ) as session:
            about = session.describe()
        record["runtime"], record["versions"] = about["runtime"], about["versions"]
        record["precisions"][precision] = about["engine"]
    return record
