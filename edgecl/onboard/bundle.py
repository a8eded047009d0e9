"""A bundle as the device sees it: its file names, its manifest, its hashes."""

import hashlib
import json
import os
import re
import stat
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

from .errors import BundleError
from .errors import OnboardError as OnboardError  # callers find every name of a bundle here

SCHEMA = 2
KIND = "bundle"
MANIFEST = "manifest.json"
REFERENCE = "reference.npz"
VERIFY = "verify.json"
ONBOARD = "onboard.pyz"
README = "README.txt"
TRTEXEC = "trtexec.sh"

# What the device code reads from a manifest, and from each of its precisions.
_KEYS = ("runtime", "precision", "precisions", "input", "output", "files")
_PRECISION_KEYS = ("model", "form", "tolerance")
_PRECISIONS = ("fp32", "fp16", "int8")
# A manifest of edgecl nests a dozen deep; reading one may not depend on how much of Python's stack is left.
_DEEPEST = 50
# Far above what edgecl writes, far below what fills a machine: the manifest; an ONNX file, which protocol buffers
# limit as well; one batch, and the reference arrays together.
_MANIFEST_BYTES = 16 << 20
_FILE_BYTES = 1 << 31
ARRAY_BYTES = 1 << 30
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
    """Say whether a path is a file as such: no link, no pipe, no device."""
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
        raise if_missing or BundleError(
            "'%s' is missing from the bundle '%s'" % (name, bundle), "export the bundle again"
        ) from exc
    except (OSError, ValueError) as exc:
        raise BundleError(_unreadable(str(path), exc)) from exc
    if stat.S_ISLNK(found.st_mode):
        raise BundleError(
            "'%s' of the bundle '%s' is a link, which may lead out of it" % (name, bundle),
            "copy the bundle with `cp -rL` if you trust where its links lead",
        )
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(
            "'%s' of the bundle '%s' is no plain file" % (name, bundle),
            "do not use this bundle; export it again",
        )
    if found.st_size > most_bytes:
        raise BundleError(
            "'%s' of the bundle '%s' has %d bytes, edgecl writes %d at most"
            % (name, bundle, found.st_size, most_bytes),
            "do not use this bundle; export it again",
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
        raise BundleError("'%s' is not valid JSON: %s" % (path, exc), "export the bundle again") from exc
    except OSError as exc:
        raise BundleError(_unreadable(str(path), exc)) from exc
    except RecursionError:
        too_deep = True
    if too_deep:
        raise BundleError(
            "'%s' is nested more than %d deep, which no bundle is" % (path, _DEEPEST),
            "export the bundle again",
        )
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise BundleError("'%s' is not the manifest of a bundle" % path, "`edgecl export` writes bundles")
    _check_manifest(path, manifest)
    return manifest


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _check_manifest(path: Path, manifest: Dict[str, Any]) -> None:
    """Hold what the device code reads from a manifest to the form it relies on.

    A hash tells that a manifest was not changed by accident; whoever writes one can seal what they like.
    """

    def expect(name: str, found: Any, fits: Callable[[Any], bool], expected: str) -> None:
        if not fits(found):
            raise BundleError(
                "'%s': '%s' is %s, expected %s" % (path, name, _shown(found), expected),
                "export the bundle again",
            )

    expect("schema", manifest.get("schema"), _is_count, "a whole number")
    if manifest["schema"] != SCHEMA:
        raise BundleError(
            "'%s' has schema %s, this edgecl reads %s" % (path, manifest["schema"], SCHEMA),
            "use the onboard.pyz that came with the bundle",
        )
    missing = [key for key in _KEYS if key not in manifest]
    if not missing:
        precisions = manifest["precisions"]
        expect("precisions", precisions, _is_filled_object, "an object of precisions")
        for name, about in precisions.items():
            expect(
                "precisions",
                name,
                lambda found: found in _PRECISIONS,
                "names out of " + ", ".join(_PRECISIONS),
            )
            expect("precisions.%s" % name, about, _is_object, "an object")
            missing += ["%s of %s" % (key, name) for key in _PRECISION_KEYS if key not in about]
    if missing:
        raise BundleError("'%s' lacks %s" % (path, ", ".join(missing)), "export the bundle again")

    expect("runtime", manifest["runtime"], _is_text, "the name of a runtime")
    expect(
        "precision",
        manifest["precision"],
        lambda found: _is_text(found) and found in precisions,
        "one of its precisions, %s" % ", ".join(precisions),
    )
    for name, about in precisions.items():
        expect("precisions.%s.model" % name, about["model"], _is_name, "the name of a file")
        expect("precisions.%s.form" % name, about["form"], _is_text, "a text")
        where, tolerance = "precisions.%s.tolerance" % name, about["tolerance"]
        expect(where, tolerance, _is_object, "an object")
        for key in ("max_relative_difference", "top1_agreement"):
            expect("%s.%s" % (where, key), tolerance.get(key), _is_number, "a number")
        if "mean_cosine" in tolerance:
            expect(where + ".mean_cosine", tolerance["mean_cosine"], _is_number, "a number")
        engines = about.get("engines")
        expect(
            "precisions.%s.engines" % name,
            engines,
            lambda found: not found or (_is_object(found) and all(map(_is_object, found.values()))),
            "an object of objects",
        )
    for name, rank, sides in (
        ("input", 4, "[batch, channels, height, width]"),
        ("output", 2, "[batch, features]"),
    ):
        form = manifest[name]
        expect(name, form, _is_object, "an object")
        expect(name + ".name", form.get("name"), _is_text, "a text")
        expect(
            name + ".shape",
            form.get("shape"),
            partial(_is_shape, rank),
            "%s, whole numbers from 1" % sides,
        )
        expect(
            name + ".shape",
            form["shape"],
            lambda shape: 4 * prod(shape) <= ARRAY_BYTES,
            "a batch of %d bytes at most" % ARRAY_BYTES,
        )
    form = manifest["input"]
    expect(
        "input.dynamic_batch",
        form.get("dynamic_batch"),
        lambda found: isinstance(found, bool),
        "true or false",
    )
    expect("input.max_batch", form.get("max_batch"), _is_count, "a whole number from 1")
    expect("files", manifest["files"], _is_object, "an object of names and hashes")
    for name, digest in manifest["files"].items():
        expect("files", name, _is_name, "names of files")
        expect("files.%s" % name, digest, _is_text, "a hash")
    target = manifest.get("target")
    expect("target", target, lambda found: found is None or _is_object(found), "an object")
    if target:
        _check_target(target, expect)


def _check_target(target: Dict[str, Any], expect: Callable[..., None]) -> None:
    expect("target.runtime", target.get("runtime"), _is_text, "the name of a runtime")
    for key in ("versions", "device"):
        expect("target." + key, target.get(key, ""), _is_text, "a text")
    build = target.get("build")
    expect("target.build", build, lambda found: found is None or _is_object(found), "an object")
    for key in ("workspace_mib", "dla_core", "optimization_level"):
        expect("target.build." + key, (build or {}).get(key), _is_setting, "a whole number")
    expect(
        "target.build.compute_capabilities",
        (build or {}).get("compute_capabilities"),
        lambda found: not found or (isinstance(found, list) and all(map(_is_text, found))),
        "a list of names",
    )


def prod(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape, however large; NumPy's overflows."""
    count = 1
    for side in shape:
        count *= side
    return count


def _is_object(found: Any) -> bool:
    return isinstance(found, dict)


def _is_filled_object(found: Any) -> bool:
    return isinstance(found, dict) and bool(found)


def _is_text(found: Any) -> bool:
    return isinstance(found, str)


def _is_name(found: Any) -> bool:
    return _is_text(found) and found.isprintable() and len(found.encode("utf-8")) <= _NAME_BYTES


def _is_setting(found: Any) -> bool:
    return found is None or (isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 1 << 31)


def _is_number(found: Any) -> bool:
    # Neither NaN nor infinite: JSON as records write it has no such numbers.
    return isinstance(found, (int, float)) and not isinstance(found, bool) and abs(found) < 1e300


def _is_count(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and 1 <= found < 1 << 31


def _is_shape(rank: int, found: Any) -> bool:
    return isinstance(found, list) and len(found) == rank and all(map(_is_count, found))


def _shown(found: Any) -> str:
    """Return a value as an error names it: in JSON's words, and short."""
    if found is None:
        return "missing"
    if isinstance(found, str):
        return repr(found) if len(found) <= 60 else repr(found[:57]) + "..."
    text = json.dumps(found)
    return text if len(text) <= 60 else text[:57] + "..."


def check_files(bundle: Union[str, Path], manifest: Dict[str, Any]) -> None:
    """Hold the manifest to its own hash, and every other file of a bundle to the hash in the manifest.

    Raises:
        BundleError: a file is missing or changed, lies outside the bundle, is a link or no plain file, or has no hash.
    """
    if manifest.get("sha256") != digest_of_record(manifest):
        raise BundleError(
            "'%s' does not match the hash of its own content" % MANIFEST,
            "the file changed after export; export the bundle again",
        )
    for name in [about["model"] for about in manifest["precisions"].values()] + [REFERENCE]:
        if name not in manifest["files"]:
            raise BundleError("the manifest holds no hash for '%s'" % name, "export the bundle again")
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
