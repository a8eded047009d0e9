"""Check a bundle's hashes, and its outputs against the reference outputs."""

from contextlib import closing
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from .bundle import check_files, choose_precision, read_manifest
from .device_info import available_cores
from .errors import DisagreementError
from .reference import read_reference
from .runtime import Report, Session
from .runtimes import open_session


def verify(
    bundle: Union[str, Path],
    *,
    precisions: Optional[Sequence[str]] = None,
    runtime: Optional[str] = None,
    report: Optional[Report] = None,
) -> Dict[str, Any]:
    """Check every file's hash, then run the reference images in each precision and compare with torch's outputs.

    None stands for all precisions that the bundle holds, and for the manifest's runtime.

    Returns:
        The record without its header, as `VerifyRecord` in edgecl/storage/records.py describes it.

    Raises:
        BundleError: a file is missing or changed, or not what the manifest says.
        DisagreementError: a difference above the manifest's tolerance; its `record` holds every precision's
            numbers.
        DeviceError: the runtime is not there, or cannot load the net.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    images, expected = read_reference(bundle, manifest)
    chosen = [choose_precision(manifest, name) for name in precisions or list(manifest["precisions"])]
    record: Dict[str, Any] = {"ok": False, "files_ok": True, "images": len(images), "precisions": {}}
    problems = []
    for name, about in chosen:
        session = open_session(
            bundle, manifest, precision=name, runtime=runtime, threads=available_cores(), report=report
        )
        with closing(session):
            found = run_all(session, images, manifest["input"])
            record["runtime"] = session.describe()["runtime"]
        record["precisions"][name], wrong = _check(found, expected, about["tolerance"])
        if wrong:
            problems.append("%s: %s" % (name, ", ".join(wrong)))
    if problems:
        error = DisagreementError(
            "%s disagrees with torch on %d reference images: %s"
            % (record["runtime"], len(images), "; ".join(problems)),
            "this runtime computes another result than the one the bundle was exported with; "
            "try another version of it, or export the bundle again",
        )
        error.record = record
        raise error
    record["ok"] = True
    return record


def _check(
    found: np.ndarray, expected: np.ndarray, tolerance: Dict[str, float]
) -> Tuple[Dict[str, Any], List[str]]:
    """Return the numbers of a precision, and in words what is wrong with them."""
    numbers: Dict[str, Any] = {}
    if found.shape != expected.shape:
        problems = ["the outputs have the shape %s, torch's have %s" % (found.shape, expected.shape)]
    elif not np.isfinite(found).all():
        problems = ["some outputs are not finite"]
    else:
        numbers = compare(found, expected)
        problems = breaches(numbers, tolerance)
    return dict(numbers, ok=not problems, tolerance=tolerance), problems


def breaches(numbers: Dict[str, Any], tolerance: Dict[str, float]) -> List[str]:
    """Return in which ways the numbers of `compare` leave a tolerance; NaN leaves every one."""
    difference, allowed = numbers["max_relative_difference"], tolerance["max_relative_difference"]
    agreement, required = numbers["top1_agreement"], tolerance["top1_agreement"]
    cosine, least = numbers["mean_cosine"], tolerance.get("mean_cosine") or 0.0
    found = (
        (
            difference <= allowed,
            "the largest relative difference is %.3g, allowed is %.3g" % (difference, allowed),
        ),
        (agreement >= required, "the top-1 agreement is %.4g, required is %.4g" % (agreement, required)),
        (cosine >= least, "the mean cosine similarity is %.4g, required is %.4g" % (cosine, least)),
    )
    return [words for holds, words in found if not holds]


def compare(found: np.ndarray, expected: np.ndarray) -> Dict[str, float]:
    """Return how far outputs (N, F) are from torch's, all finite."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    difference = np.abs(found - expected)
    largest, scale = float(difference.max()), float(np.abs(expected).max())
    return {
        "max_abs_difference": largest,
        "mean_abs_difference": float(difference.mean()),
        # Torch's outputs are all zero only for a dead net: then any difference counts whole.
        "max_relative_difference": largest / scale if scale > 0 else largest,
        "top1_agreement": float(np.mean(found.argmax(axis=1) == expected.argmax(axis=1))),
        "mean_cosine": float(np.mean(_cosines(found, expected))),
    }


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine similarity of each row (N,): 1 for two rows of zeros, 0 for one."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    cosines = np.einsum("nf,nf->n", a, b) / np.where(lengths > 0, lengths, 1.0)
    return np.where(both_zero, 1.0, np.minimum(cosines, 1.0))


def run_all(session: Session, images: np.ndarray, form: Dict[str, Any]) -> np.ndarray:
    """Run any number of images in batches the net takes; a static batch is filled up with the last image."""
    size = form["max_batch"] if form["dynamic_batch"] else form["shape"][0]
    outputs = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        count = len(batch)
        if not form["dynamic_batch"] and count < size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], size - count, axis=0)])
        outputs.append(session.run(batch)[:count])
    return np.concatenate(outputs)
