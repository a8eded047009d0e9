"""A bundle's reference images, and what torch made of them."""

import zipfile
from pathlib import Path
from typing import Any, Dict, Tuple, Union

import numpy as np

from .bundle import ARRAY_BYTES, REFERENCE, input_dtype, plain_file, prod
from .errors import BundleError


def read_reference(bundle: Union[str, Path], manifest: Dict[str, Any]) -> Tuple[np.ndarray, np.ndarray]:
    """Return the reference images as the nets take them, and torch's outputs for them.

    The headers of the arrays are checked against the manifest before they are unpacked: a file of a few megabytes can
    unpack to as many gigabytes.

    Returns:
        inputs: (N, C, H, W) or (N, H, W, C), float32 or uint8, as the manifest says.
        outputs: (N, F) or (N, K) float32.

    Raises:
        BundleError: not an archive of arrays, of shapes the manifest does not allow, or with outputs that are not finite.
    """
    path = plain_file(bundle, REFERENCE, most_bytes=ARRAY_BYTES)
    try:
        with zipfile.ZipFile(str(path)) as archive:
            shapes = [
                _shape_of(archive, name, dtype)
                for name, dtype in (("inputs.npy", input_dtype(manifest)), ("outputs.npy", "float32"))
            ]
            _check_shapes(shapes[0], shapes[1], manifest)
        with np.load(str(path), allow_pickle=False) as arrays:
            inputs = np.ascontiguousarray(arrays["inputs.npy"], dtype=input_dtype(manifest))
            outputs = np.ascontiguousarray(arrays["outputs.npy"], dtype=np.float32)
    except BundleError:
        raise
    # Of damaged bytes zipfile and NumPy complain in a dozen classes, some not documented.
    except Exception as exc:
        raise BundleError(
            "'%s' holds no reference inputs and outputs: %s" % (path, str(exc) or type(exc).__name__)
        ) from exc
    if not np.isfinite(outputs).all():
        raise BundleError("'%s' has outputs that are not finite" % REFERENCE)
    return inputs, outputs


def _shape_of(archive: zipfile.ZipFile, name: str, wanted: str) -> Tuple[int, ...]:
    """Return the shape that the header of an array states."""
    with archive.open(name) as member:
        # Later versions are for headers above 64 KiB, and state a length of up to 4 GiB.
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError("'%s' has a header of a version that edgecl does not write" % name)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype.kind != np.dtype(wanted).kind or dtype.itemsize > 8:
        raise ValueError("'%s' holds %s, not %s" % (name, dtype, wanted))
    return tuple(int(side) for side in shape)


def _check_shapes(inputs: Tuple[int, ...], outputs: Tuple[int, ...], manifest: Dict[str, Any]) -> None:
    image, features = tuple(manifest["input"]["shape"][1:]), manifest["output"]["shape"][1]
    if inputs[1:] != image or not 1 <= inputs[0] or outputs != (inputs[0], features):
        raise BundleError(
            "'%s' has inputs %s and outputs %s; the manifest asks for inputs (N, %s) and outputs (N, %d)"
            % (REFERENCE, inputs, outputs, ", ".join(str(side) for side in image), features)
        )
    # In float64, the widest, which is what it takes while it is being read.
    if 8 * (prod(inputs) + prod(outputs)) > ARRAY_BYTES:
        raise BundleError("'%s' states %d images, more than edgecl reads" % (REFERENCE, inputs[0]))
