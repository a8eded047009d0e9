"""Manifests that are whole, and those that lie about the files beside them."""

import json

import pytest

from edgecl.onboard.bench import bench
from edgecl.onboard.bundle import check_files, choose_precision, sha256_of_file
from edgecl.onboard.bundle import read_manifest as read_onboard
from edgecl.onboard.errors import BundleError
from edgecl.onboard.verify import verify

from .tiny_bundle import flip_byte, make_bundle, read_manifest, write_manifest


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle", precisions=("fp16", "fp32"))


def check(bundle):
    check_files(bundle, read_onboard(bundle))


def test_a_whole_bundle_passes(bundle):
    check(bundle)


def test_the_default_precision_is_the_manifests(bundle):
    manifest = read_onboard(bundle)
    assert choose_precision(manifest)[0] == "fp16"
    assert choose_precision(manifest, "fp32")[1]["model"] == "model.onnx"


@pytest.mark.parametrize("name", ["model.onnx", "model.fp16.onnx", "reference.npz"])
def test_a_flipped_byte_in_any_file_is_named(bundle, name):
    flip_byte(bundle / name)
    with pytest.raises(BundleError, match=f"'{name}' does not match its hash"):
        check(bundle)


def test_a_missing_file_of_a_precision_that_is_not_asked_for_is_named(bundle):
    (bundle / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"'model\.onnx' is missing from the bundle"):
        verify(bundle, precisions=["fp16"])


def test_a_precision_without_a_hash_is_refused(bundle):
    manifest = read_manifest(bundle)
    del manifest["files"]["model.fp16.onnx"]
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match=r"the manifest holds no hash for 'model\.fp16\.onnx'"):
        check(bundle)


@pytest.mark.parametrize(
    "name", ["../secret.onnx", "/etc/passwd", "sub/model.onnx", "..\\secret.onnx", "..", ""]
)
@pytest.mark.parametrize("act", [verify, bench], ids=["verify", "bench"])
def test_a_precision_whose_file_lies_elsewhere_is_refused_though_its_hash_is_right(bundle, name, act):
    (bundle / "sub").mkdir()
    content = (bundle / "model.onnx").read_bytes()
    for path in (bundle.parent / "secret.onnx", bundle / "sub" / "model.onnx"):
        path.write_bytes(content)
    manifest = read_manifest(bundle)
    manifest["precisions"]["fp16"]["model"] = name
    manifest["files"][name] = sha256_of_file(bundle / "model.onnx")
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError) as caught:
        act(bundle)
    assert (
        caught.value.problem == f"the manifest names '{name}', which is no plain file name inside the bundle"
    )
    assert caught.value.hint == "do not run this bundle; export it again"


@pytest.mark.parametrize("key", ["precisions", "precision", "runtime", "input", "files"])
def test_a_manifest_without_a_key_is_named(bundle, key):
    manifest = read_manifest(bundle)
    del manifest[key]
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match=f"lacks {key}$"):
        check(bundle)


@pytest.mark.parametrize("key", ["model", "form", "tolerance"])
def test_a_precision_without_a_key_is_named(bundle, key):
    manifest = read_manifest(bundle)
    del manifest["precisions"]["fp32"][key]
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match=f"lacks {key} of fp32$"):
        check(bundle)


def test_a_newer_schema_is_refused_with_both(bundle):
    write_manifest(bundle, {**read_manifest(bundle), "schema": 99})
    with pytest.raises(BundleError, match="has schema 99, this runner reads up to 1"):
        check(bundle)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"kind": "model"}'])
def test_a_file_that_is_no_manifest_is_named(bundle, text):
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json' is not"):
        check(bundle)


def test_an_edited_manifest_is_found(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["precision"] = "fp32"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"'manifest\.json' does not match the hash of its own content"):
        check(bundle)
