"""A bundle's reference images, and what torch made of them."""

import zipfile
import zlib
from pathlib import Path
from typing import Any, Dict, Tuple, Union

import numpy as np

from .bundle import REFERENCE
from .errors import BundleError


def read_reference(bundle: Union[str, Path], manifest: Dict[str, Any]) -> Tuple[np.ndarray, np.ndarray]:
    """Return the reference images after preprocessing, and torch's outputs for them.

    Returns:
        inputs: (N, C, H, W) float32, C, H and W as the manifest says.
        outputs: (N, F) or (N, K) float32.

    Raises:
        BundleError: not an archive of arrays, of shapes the manifest does not allow, or with outputs that are not finite.
    """
    path = Path(bundle) / REFERENCE
    try:
        if not zipfile.is_zipfile(str(path)):  # np.load would take a bare array too
            raise ValueError("it is no archive")
        with np.load(str(path), allow_pickle=False) as arrays:
            inputs = np.ascontiguousarray(arrays["inputs"], dtype=np.float32)
            outputs = np.ascontiguousarray(arrays["outputs"], dtype=np.float32)
    except (OSError, ValueError, TypeError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as complaint:
        raise BundleError(
            "'%s' holds no reference inputs and outputs: %s" % (path, complaint), "export the bundle again"
        ) from complaint
    image = tuple(manifest["input"]["shape"][1:])
    if inputs.shape[1:] != image or outputs.ndim != 2 or not 1 <= len(inputs) == len(outputs):
        raise BundleError(
            "'%s' has inputs %s and outputs %s; the manifest asks for inputs (N, %s) and as many outputs"
            % (REFERENCE, inputs.shape, outputs.shape, ", ".join(str(side) for side in image)),
            "export the bundle again",
        )
    if not outputs.size or not np.isfinite(outputs).all():
        raise BundleError(
            "'%s' holds outputs that no net can be held to: %s"
            % (REFERENCE, "some are not finite" if outputs.size else "there are none"),
            "export the bundle again",
        )
    return inputs, outputs
