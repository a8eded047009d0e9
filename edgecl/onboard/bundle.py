"""A bundle as the device sees it: its file names, its manifest, its hashes."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, Union

from .errors import BundleError
from .errors import OnboardError as OnboardError  # callers find every name of a bundle here

SCHEMA = 1
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
        BundleError: no bundle, not JSON, of a newer schema, or without a key the device needs.
    """
    path = Path(bundle) / MANIFEST
    if not path.is_file():
        raise BundleError(
            "'%s' is not a bundle directory: it has no %s" % (bundle, MANIFEST),
            "`edgecl export` writes bundles",
        )
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"))
    except ValueError as complaint:
        raise BundleError(
            "'%s' is not valid JSON: %s" % (path, complaint), "export the bundle again"
        ) from complaint
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise BundleError("'%s' is not the manifest of a bundle" % path, "`edgecl export` writes bundles")
    if manifest.get("schema", 0) > SCHEMA:
        raise BundleError(
            "'%s' has schema %s, this runner reads up to %s" % (path, manifest["schema"], SCHEMA),
            "use the runner that came with the bundle",
        )
    missing = [key for key in _KEYS if key not in manifest]
    if not missing:
        for name, about in manifest["precisions"].items():
            missing += ["%s of %s" % (key, name) for key in _PRECISION_KEYS if key not in about]
    if missing:
        raise BundleError("'%s' lacks %s" % (path, ", ".join(missing)), "export the bundle again")
    return manifest


def check_files(bundle: Union[str, Path], manifest: Dict[str, Any]) -> None:
    """Hold the manifest to its own hash, and every other file of a bundle to the hash in the manifest.

    Raises:
        BundleError: a file is missing or changed, lies outside the bundle, or has no hash.
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
        path = Path(bundle) / name
        if not path.is_file():
            raise BundleError(
                "'%s' is missing from the bundle '%s'" % (name, bundle), "export the bundle again"
            )
        found = sha256_of_file(path)
        if found != expected:
            raise BundleError(
                "'%s' does not match its hash: the manifest says %s..., the file has %s..."
                % (name, expected[:12], found[:12]),
                "the file changed after export; export the bundle again",
            )
