"""Hold a bundle to its hashes and its reference outputs."""

from pathlib import Path
from typing import Any, Dict, Union

import numpy as np

from .bundle import check_files, read_manifest
from .errors import DisagreementError
from .passport import available_cores
from .reference import read_reference
from .runners import Runner, open_runner


def verify(bundle: Union[str, Path]) -> Dict[str, Any]:
    """Check every file's hash, then run the reference images and compare with torch's outputs.

    Returns:
        ok and files_ok, both True; max_abs_difference and mean_abs_difference in units of the output;
        max_relative_difference, the largest absolute difference over torch's largest absolute output;
        top1_agreement, the fraction of images with the same largest output; images, tolerance, runtime and
        precision.

    Raises:
        BundleError: a file is missing or changed, or not what the manifest says.
        DisagreementError: a difference above the manifest's tolerance; its `record` says ok False.
        DeviceError: the runtime is not there, or cannot load the net.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    images, expected = read_reference(bundle, manifest)
    runner = open_runner(bundle, manifest, threads=available_cores())
    found = run_all(runner, images, manifest["input"])
    about = runner.describe()
    tolerance = manifest["tolerance"]
    record: Dict[str, Any] = {"ok": False, "files_ok": True, "images": len(images), "tolerance": tolerance}
    record.update(runtime=about["runtime"], precision=about["precision"])
    if found.shape != expected.shape or not np.isfinite(found).all():
        what = (
            "has shape %s" % (found.shape,)
            if found.shape != expected.shape
            else "holds values that are not finite"
        )
        raise DisagreementError(
            "the net's output %s; torch gave finite values of shape %s" % (what, expected.shape),
            "export the bundle again",
            record,
        )
    record.update(compare(found, expected))
    breaches = []
    relative, allowed = record["max_relative_difference"], tolerance["max_relative_difference"]
    if not relative <= allowed:
        breaches.append("the largest relative difference is %.3g, allowed is %.3g" % (relative, allowed))
    agreement, required = record["top1_agreement"], tolerance["top1_agreement"]
    if not agreement >= required:
        breaches.append("top-1 agreement is %.4g, required is %.4g" % (agreement, required))
    if breaches:
        raise DisagreementError(
            "%s disagrees with torch on %d reference images: %s"
            % (about["runtime"], len(images), "; ".join(breaches)),
            "this runtime computes another result than the one the bundle was exported with; "
            "try another version of it, or export the bundle again",
            record,
        )
    record["ok"] = True
    return record


def compare(found: np.ndarray, expected: np.ndarray) -> Dict[str, float]:
    """Return how far outputs (N, F) are from torch's, all finite."""
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    largest, scale = float(difference.max()), float(np.abs(expected).max())
    return {
        "max_abs_difference": largest,
        "mean_abs_difference": float(difference.mean()),
        # Torch's outputs are all zero only for a dead net: then any difference counts whole.
        "max_relative_difference": largest / scale if scale > 0 else largest,
        "top1_agreement": float(np.mean(found.argmax(axis=1) == expected.argmax(axis=1))),
    }


def run_all(runner: Runner, images: np.ndarray, form: Dict[str, Any]) -> np.ndarray:
    """Run any number of images in batches the net takes; a static batch is filled up with the last image."""
    size = form["max_batch"] if form["dynamic_batch"] else form["shape"][0]
    outputs = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        count = len(batch)
        if not form["dynamic_batch"] and count < size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], size - count, axis=0)])
        outputs.append(runner.run(batch)[:count])
    return np.concatenate(outputs)
