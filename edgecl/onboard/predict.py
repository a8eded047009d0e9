"""Name what is on pictures: file in, classes and scores out, by a bundle's net here or by any function that runs one."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from .bundle import check_files, read_manifest
from .device_info import available_cores
from .errors import BundleError, DeviceError
from .pictures import UnreadablePicture, as_input, find_pictures, read_picture
from .runtime import Report, Run
from .runtimes import open_session
from .verify import run_all

# Pictures in memory at a time, decoded.
_CHUNK = 32
_REPORT_EVERY_S = 0.5

DONE = "%d of %d pictures"
"""A line of progress."""


class Classifier(NamedTuple):
    """A net with all that stands between a file and a class."""

    run: Run
    """Pictures as `form` says -> (N, K) outputs."""
    form: Dict[str, Any]
    """The manifest's `input`."""
    preprocessing: Dict[str, Any]
    classes: Sequence[str]
    score: Run
    """Outputs -> probabilities: `softmax`, or `sigmoid` where a picture may be of several classes."""


def predict(
    bundle: Union[str, Path],
    pictures: Sequence[Union[str, Path]],
    *,
    top: int = 5,
    precision: Optional[str] = None,
    runtime: Optional[str] = None,
    threads: Optional[int] = None,
    report: Optional[Report] = None,
) -> Dict[str, Any]:
    """Decode pictures, run them through a bundle's net, and name the likeliest classes of each.

    None stands for the bundle's own precision and runtime, and every core.

    Returns:
        The record without `made_from`, as `Predictions` in edgecl/storage/records.py describes it.

    Raises:
        BundleError: a file is missing or changed, not what the manifest says, no such precision, or no classifier.
        DataError: no such picture or folder, or no picture in it.
        DeviceError: nothing that decodes a picture, or the runtime is not there or cannot run the net.
    """
    if top < 1:
        raise DeviceError("cannot name %d classes" % top, "ask for 1 or more")
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    classes, preprocessing = manifest.get("classes"), manifest.get("preprocessing")
    if classes is None:
        raise BundleError(
            "the bundle's net gives features, not classes", "`edgecl finetune` adds a classifier; export that"
        )
    form, sides = manifest["input"], sorted(manifest["input"]["shape"][1:])
    if preprocessing is None or sides != sorted([3] + 2 * [preprocessing["image_size"]]):
        raise BundleError("the manifest does not say how pictures become inputs of %s" % form["shape"])
    if len(classes) != manifest["output"]["shape"][1]:
        raise BundleError("%d classes, and %d outputs" % (len(classes), manifest["output"]["shape"][1]))
    files, threads = find_pictures(pictures), threads or available_cores()
    session = open_session(
        bundle, manifest, precision=precision, runtime=runtime, threads=threads, report=report
    )
    with closing(session):
        about = session.describe()
        net = Classifier(
            partial(run_all, session, form=form), form, preprocessing, classes, _score_of(manifest)
        )
        found = classify(net, files, top=top, threads=threads, report=report)
    return dict(found, runtime=about["runtime"], precision=about["precision"])


def classify(
    net: Classifier, files: Sequence[Path], *, top: int, threads: int, report: Optional[Report] = None
) -> Dict[str, Any]:
    """Name the classes of pictures; one that cannot be read gets its problem said instead.

    Returns:
        decoders, the number of pictures and of unreadable ones, and predictions, in the order of the files.

    Raises:
        DeviceError: as in `predict`, or the net gives values that are not finite.
    """
    read = partial(_read, net=net)
    predictions: List[Dict[str, Any]] = []
    decoders: Dict[str, None] = {}
    said_at = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(files), _CHUNK):
            part = files[start : start + _CHUNK]
            read_in = list(pool.map(read, part))
            readable = [pixels for pixels, _ in read_in if pixels is not None]
            named = iter(_name(net, np.stack(readable), top) if readable else ())
            for file, (pixels, words) in zip(part, read_in):  # noqa: B905
                if pixels is None:
                    predictions.append({"file": str(file), "top": [], "problem": words})
                else:
                    decoders[words] = None
                    predictions.append({"file": str(file), "top": next(named), "problem": None})
            if report and time.monotonic() - said_at > _REPORT_EVERY_S:
                said_at = time.monotonic()
                report(DONE % (len(predictions), len(files)))
    return {
        "decoders": list(decoders),
        "images": len(predictions),
        "unreadable": sum(one["problem"] is not None for one in predictions),
        "predictions": predictions,
    }


def _read(file: Path, net: Classifier) -> Tuple[Optional[np.ndarray], str]:
    """Return a picture's square and what decoded it, or None and what is wrong with it."""
    size = {name: net.preprocessing[name] for name in ("resize_size", "image_size")}
    try:
        return read_picture(file, **size)
    except UnreadablePicture as exc:
        return None, str(exc)


def _name(net: Classifier, squares: np.ndarray, top: int) -> List[List[Dict[str, Any]]]:
    """Return the likeliest classes of each picture."""
    outputs = net.run(as_input(squares, net.form, net.preprocessing))
    if not np.isfinite(outputs).all():
        raise DeviceError("the net gives values that are not finite", "try another precision of the bundle")
    return [
        [
            {"label": int(label), "name": net.classes[label], "score": round(float(row[label]), 6)}
            for label in np.argsort(-row, kind="stable")[:top]
        ]
        for row in net.score(outputs)
    ]


def _score_of(manifest: Dict[str, Any]) -> Run:
    if manifest["output"].get("softmax"):
        return np.asarray
    return sigmoid if (manifest.get("net") or {}).get("label_sets") else softmax


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities (N, K) of logits, float32."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return shares.astype(np.float32)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return each class's own probability (N, K), float32."""
    shares: np.ndarray = 0.5 + 0.5 * np.tanh(0.5 * logits.astype(np.float64))
    return shares.astype(np.float32)
