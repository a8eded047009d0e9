"""A bundle as the device sees it: its file names, its manifest, its hashes."""

import hashlib
import json
import mmap
import os
import re
import stat
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple, Union

from .errors import BundleError
from .versions import bounds_of

SCHEMA = 2
KIND = "bundle"
MANIFEST = "manifest.json"
REFERENCE = "reference.npz"
VERIFY = "verify.json"
ONBOARD = "onboard.pyz"
README = "README.txt"
LABELS = "labels.txt"
TRTEXEC = "trtexec.sh"

PRECISIONS = ("fp32", "fp16", "int8")
"""From the widest to the narrowest."""
# A manifest of edgecl nests a dozen deep; reading one may not depend on how much of Python's stack is left.
_DEEPEST = 50
# Far above what edgecl writes, far below what fills a machine: the manifest; an ONNX file, which protocol buffers
# limit as well; one batch, and the reference arrays together.
_MANIFEST_BYTES = 16 << 20
_FILE_BYTES = 1 << 31
ARRAY_BYTES = 1 << 30
# How an ONNX file begins: the field `ir_version`.
_ONNX_BEGINS = b"\x08"
# A tensor with data in another file names it in an entry of the key "location". In the file the key follows its length, 8,
# which protocol buffers also read with superfluous bytes.
_LOCATION = re.compile(b"(\x08|\x88[\x80-\xff]*[\x00-\x7f])location")
# What a file system takes.
_NAME_BYTES = 255


def onnx_name(precision: str) -> str:
    """Return the file name of the net in a precision."""
    return "model.onnx" if precision == "fp32" else "model.%s.onnx" % precision


def slug(text: str) -> str:
    """Return a text as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "device"


def bench_name(device: str, runtime: str, precisions: Sequence[str], threads: int, batch: int) -> str:
    """Return the file name of a measurement; another device, runtime, precision, thread count or batch, another file."""
    return "bench-%s-%s-%s-%dt-b%d.json" % (slug(device), slug(runtime), "+".join(precisions), threads, batch)


def engine_name(precision: str, made_for: str) -> str:
    """Return the file name of an engine built in a precision for a device and version."""
    return "engine-%s-%s.plan" % (precision, slug(made_for))


def choose_precision(manifest: Dict[str, Any], precision: Optional[str] = None) -> Tuple[str, Dict[str, Any]]:
    """Return a precision of a bundle, the bundle's default where None, with what the manifest says about it.

    Raises:
        BundleError: the bundle does not hold that precision.
    """
    chosen = precision or manifest["precision"]
    if chosen not in manifest["precisions"]:
        raise BundleError(
            "the bundle holds no %s net; it has %s" % (chosen, ", ".join(manifest["precisions"])),
            "export it again with --precision %s" % chosen,
        )
    return chosen, manifest["precisions"][chosen]


def input_dtype(manifest: Dict[str, Any]) -> str:
    """Return NumPy's name of the type that the nets of a bundle take: 'float32', or 'uint8' of raw pixels."""
    return str(manifest["input"].get("dtype") or "float32")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file aside, flush it to the disk and rename it: a reader sees all of it or none."""
    aside = path.with_name("%s.%d.part" % (path.name, os.getpid()))
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        if aside.exists():
            aside.unlink()


def is_plain_file(path: Path) -> bool:
    """Return whether a path is a file as such: no link, no pipe, no device."""
    try:
        return stat.S_ISREG(os.lstat(str(path)).st_mode)
    except (OSError, ValueError):
        return False


def read_plain(path: Path) -> bytes:
    """Return the content of a file beside those of a bundle.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    if not is_plain_file(path):
        raise FileNotFoundError("'%s' is no plain file" % path)
    return path.read_bytes()


def plain_file(
    bundle: Union[str, Path],
    name: str,
    *,
    most_bytes: int = _FILE_BYTES,
    if_missing: Optional[BundleError] = None,
) -> Path:
    """Return the path of a file of a bundle once it is seen to be one that may be opened.

    A link may lead out of the bundle, and a pipe or a device never ends.

    Raises:
        BundleError: missing, out of reach, no plain file, or larger than any of edgecl's.
    """
    path = Path(bundle) / name
    try:
        found = os.lstat(str(path))
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise if_missing or BundleError("'%s' is missing from the bundle '%s'" % (name, bundle)) from exc
    except (OSError, ValueError) as exc:
        raise BundleError(_unreadable(str(path), exc)) from exc
    if stat.S_ISLNK(found.st_mode):
        raise BundleError(
            "'%s' of the bundle '%s' is a link, which may lead out of it" % (name, bundle),
            "copy the bundle with `cp -rL` if you trust where its links lead",
        )
    wrong = ""
    if not stat.S_ISREG(found.st_mode):
        wrong = "is no plain file"
    elif found.st_size > most_bytes:
        wrong = "has %d bytes, edgecl writes %d at most" % (found.st_size, most_bytes)
    if wrong:
        raise BundleError(
            "'%s' of the bundle '%s' %s" % (name, bundle, wrong), "do not use this bundle; export it again"
        )
    return path


def _unreadable(name: str, exc: Exception) -> str:
    return "'%s' cannot be read: %s" % (name, getattr(exc, "strerror", None) or exc)


def sha256_of_file(path: Union[str, Path]) -> str:
    """Return the sha256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def digest_of_record(record: Dict[str, Any]) -> str:
    """Return the sha256 of a JSON record's content, its own "sha256" apart."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def read_manifest(bundle: Union[str, Path]) -> Dict[str, Any]:
    """Return the manifest of a bundle directory.

    Raises:
        BundleError: no bundle, not JSON, of a newer schema, without a key the device needs, or with another kind of
            value than it needs there.
    """
    path = Path(bundle) / MANIFEST
    plain_file(
        bundle,
        MANIFEST,
        most_bytes=_MANIFEST_BYTES,
        if_missing=BundleError(
            "'%s' is not a bundle directory: it has no %s" % (bundle, MANIFEST),
            "`edgecl export` writes bundles",
        ),
    )
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"))
        too_deep = _is_deeper(manifest, _DEEPEST)
    except ValueError as exc:
        raise BundleError("'%s' is not valid JSON: %s" % (path, exc)) from exc
    except OSError as exc:
        raise BundleError(_unreadable(str(path), exc)) from exc
    except RecursionError:
        too_deep = True
    if too_deep:
        raise BundleError("'%s' is nested more than %d deep, which no bundle is" % (path, _DEEPEST))
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise BundleError("'%s' is not the manifest of a bundle" % path, "`edgecl export` writes bundles")
    _check_manifest(path, manifest)
    return manifest


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        objects = [list(one.values()) if isinstance(one, dict) else one for one in level]
        level = [inner for one in objects if isinstance(one, list) for inner in one]
    return bool(level)


def _check_manifest(path: Path, manifest: Dict[str, Any]) -> None:
    """Check what the device code reads from a manifest: a hash does not tell who wrote it."""
    for where, fits, expected in _RULES:
        for name, found in _values_at(manifest, where.split(".")):
            if not fits(found):
                raise BundleError("'%s': '%s' is %s, expected %s" % (path, name, _shown(found), expected))
        if where == "schema" and manifest["schema"] != SCHEMA:
            raise BundleError(
                "'%s' has schema %s, this edgecl reads %s" % (path, manifest["schema"], SCHEMA),
                "use the onboard.pyz that came with the bundle",
            )
    if manifest["precision"] not in manifest["precisions"]:
        raise BundleError(
            "'%s': 'precision' is '%s', expected one of its precisions, %s"
            % (path, manifest["precision"], ", ".join(manifest["precisions"]))
        )


def _values_at(value: Any, keys: Sequence[str], name: str = "") -> Iterator[Tuple[str, Any]]:
    """Yield name and value of each place that keys lead to; none below what is no object, which has its own rule."""
    if not keys:
        yield name.lstrip("."), value
    elif isinstance(value, dict):
        wanted, optional = keys[0].rstrip("?"), keys[0].endswith("?")
        for key in list(value) if wanted == "*" else [wanted]:
            if not (optional and value.get(key) is None):
                yield from _values_at(value.get(key), keys[1:], "%s.%s" % (name, key))


def prod(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape, however large; NumPy's overflows."""
    count = 1
    for side in shape:
        count *= side
    return count


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda found: isinstance(found, kind)


_is_object, _is_text, _is_flag = _is_a(dict), _is_a(str), _is_a(bool)


def _is_name(found: Any) -> bool:
    return _is_text(found) and found.isprintable() and len(found.encode("utf-8")) <= _NAME_BYTES


def _is_whole(found: Any, least: int = 0) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and least <= found < 1 << 31


def _is_count(found: Any) -> bool:
    return _is_whole(found, 1)


def _is_number(found: Any) -> bool:
    # Neither NaN nor infinite: JSON as records write it has no such numbers.
    return isinstance(found, (int, float)) and not isinstance(found, bool) and abs(found) < 1e300


def _are_precisions(found: Any) -> bool:
    return _is_object(found) and bool(found) and all(name in PRECISIONS for name in found)


def _are_files(found: Any) -> bool:
    return _is_object(found) and all(map(_is_name, found)) and all(map(_is_text, found.values()))


def _are_texts(found: Any) -> bool:
    return isinstance(found, list) and all(map(_is_text, found))


def _is_one_of(*known: str) -> Callable[[Any], bool]:
    return lambda found: _is_text(found) and found in known


def _is_per_channel(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 3 and all(map(_is_number, found))


def _is_shape(rank: int, found: Any) -> bool:
    return (
        isinstance(found, list)
        and len(found) == rank
        and all(map(_is_count, found))
        and 4 * prod(found) <= ARRAY_BYTES
    )


def _is_range(found: Any) -> bool:
    try:
        bounds_of(found)
    except (TypeError, ValueError, AttributeError):
        return False
    return True


_BYTES = "whole numbers from 1, %d bytes at most" % ARRAY_BYTES
# Place, test, what is expected there. `*` is every key of an object; what has a `?` may be missing or null.
_RULES: Tuple[Tuple[str, Callable[[Any], bool], str], ...] = (
    ("schema", _is_count, "a whole number"),
    ("runtime", _is_text, "the name of a runtime"),
    ("precision", _is_text, "the name of a precision"),
    ("precisions", _are_precisions, "an object of precisions, which are " + ", ".join(PRECISIONS)),
    ("precisions.*", _is_object, "an object"),
    ("precisions.*.model", _is_name, "the name of a file"),
    ("precisions.*.form", _is_text, "a text"),
    ("precisions.*.tolerance", _is_object, "an object"),
    ("precisions.*.tolerance.max_relative_difference", _is_number, "a number"),
    ("precisions.*.tolerance.top1_agreement", _is_number, "a number"),
    ("precisions.*.tolerance.mean_cosine?", _is_number, "a number"),
    ("precisions.*.engines?", _is_object, "an object"),
    ("precisions.*.engines?.*", _is_object, "an object"),
    ("input", _is_object, "an object"),
    ("input.name", _is_text, "a text"),
    (
        "input.shape",
        partial(_is_shape, 4),
        "[batch, channels, height, width] or with channels last, " + _BYTES,
    ),
    ("input.dtype?", _is_one_of("float32", "uint8"), "'float32' or 'uint8'"),
    ("input.layout?", _is_one_of("nchw", "nhwc"), "'nchw' or 'nhwc'"),
    ("input.dynamic_batch", _is_flag, "true or false"),
    ("input.max_batch", _is_count, "a whole number from 1"),
    ("output", _is_object, "an object"),
    ("output.name", _is_text, "a text"),
    ("output.shape", partial(_is_shape, 2), "[batch, features], " + _BYTES),
    ("output.softmax?", _is_flag, "true or false"),
    ("classes?", _are_texts, "a list of names"),
    ("net?", _is_object, "an object"),
    ("net?.label_sets?", _is_flag, "true or false"),
    ("preprocessing?", _is_object, "an object"),
    ("preprocessing?.image_size", _is_count, "a whole number from 1"),
    (
        "preprocessing?.resize_size",
        lambda found: _is_count(found) and found <= 8192,
        "a whole number from 1 to 8192",
    ),
    ("preprocessing?.mean", _is_per_channel, "three numbers"),
    ("preprocessing?.std", _is_per_channel, "three numbers"),
    ("files", _are_files, "an object of file names and hashes"),
    ("target?", _is_object, "an object"),
    ("target?.runtime", _is_text, "the name of a runtime"),
    ("target?.versions?", _is_range, "a range of versions"),
    ("target?.device?", _is_text, "a text"),
    ("target?.build?", _is_object, "an object"),
    ("target?.build?.workspace_mib?", _is_whole, "a whole number"),
    ("target?.build?.dla_core?", _is_whole, "a whole number"),
    ("target?.build?.optimization_level?", _is_whole, "a whole number"),
    ("target?.build?.compute_capabilities?", _are_texts, "a list of names"),
)


def _shown(found: Any) -> str:
    """Return a value as an error names it: in JSON's words, and short."""
    if found is None:
        return "missing"
    if isinstance(found, str):
        return repr(found) if len(found) <= 60 else repr(found[:57]) + "..."
    text = json.dumps(found)
    return text if len(text) <= 60 else text[:57] + "..."


def check_files(bundle: Union[str, Path], manifest: Dict[str, Any]) -> None:
    """Check the manifest against its own hash, every other file against the hash in the manifest, and the ONNX files.

    Raises:
        BundleError: a file is missing or changed, lies outside the bundle, is a link or no plain file, or
            has no hash; or an ONNX file that is none, or reads other files.
    """
    if manifest.get("sha256") != digest_of_record(manifest):
        raise BundleError(
            "'%s' does not match the hash of its own content" % MANIFEST,
            "the file changed after export; export the bundle again",
        )
    models = [about["model"] for about in manifest["precisions"].values()]
    for name in [*models, REFERENCE]:
        if name not in manifest["files"]:
            raise BundleError("the manifest holds no hash for '%s'" % name)
    for name, expected in sorted(manifest["files"].items()):
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise BundleError(
                "the manifest names '%s', which is no plain file name inside the bundle" % name,
                "do not run this bundle; export it again",
            )
        path = plain_file(bundle, name)
        try:
            found = sha256_of_file(path)
        except OSError as exc:
            raise BundleError(_unreadable(name, exc)) from exc
        if found != expected:
            raise BundleError(
                "'%s' does not match its hash: the manifest says %s..., the file has %s..."
                % (name, expected[:12], found[:12]),
                "the file changed after export; export the bundle again",
            )
    for name in models:
        if name.endswith(".onnx"):
            check_self_contained(Path(bundle) / name)


def check_self_contained(path: Path) -> None:
    """Refuse an ONNX file that may read weights from another file, which no hash of the bundle covers.

    Raises:
        BundleError: it may, or is no ONNX file.
    """
    with path.open("rb") as file:
        if file.read(1) != _ONNX_BEGINS:
            raise BundleError("'%s' is no ONNX file" % path.name)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            outside = _LOCATION.search(content)
    if outside:
        raise BundleError(
            "'%s' keeps weights in another file, or calls a tensor 'location'" % path.name,
            "do not run this bundle; export it again: edgecl writes the weights into the file",
        )
