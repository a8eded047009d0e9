"""Manifests that are whole, and those that lie about the files beside them."""

import json

import pytest

from edgecl.onboard.bench import bench
from edgecl.onboard.bundle import SCHEMA, check_files, choose_precision, sha256_of_file
from edgecl.onboard.bundle import read_manifest as read_onboard
from edgecl.onboard.errors import BundleError
from edgecl.onboard.verify import verify

from .tiny_bundle import flip_byte, make_bundle, read_manifest, write_manifest


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle", precisions=("fp16", "fp32"))


def check(bundle):
    check_files(bundle, read_onboard(bundle))


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
    with pytest.raises(BundleError, match=r"no hash for 'model\.fp16\.onnx'"):
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
    assert f"manifest names '{name}', which is no plain file name" in caught.value.problem
    assert "do not run" in caught.value.hint


@pytest.mark.parametrize("schema", [SCHEMA - 1, 99])
def test_another_schema_is_refused_with_both(bundle, schema):
    write_manifest(bundle, {**read_manifest(bundle), "schema": schema})
    with pytest.raises(BundleError, match=f"schema {schema}, .*reads {SCHEMA}"):
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
    with pytest.raises(BundleError, match=r"'manifest\.json' .*hash of its own content"):
        check(bundle)


REMOVED = object()


def reseal(bundle, place, value):
    """Put a value into the manifest, or take one out, and seal it again: its hash is right, its form is not."""
    manifest = read_manifest(bundle)
    *outer, last = place
    inside = manifest
    for key in outer:
        inside = inside[key]
    if value is REMOVED:
        del inside[last]
    else:
        inside[last] = value
    write_manifest(bundle, manifest)


@pytest.mark.parametrize(
    ("place", "value", "found"),
    [
        ("schema", "1", "'1'"),
        ("schema", True, "true"),
        ("schema", REMOVED, "missing"),
        ("precision", "int8", "'int8'"),
        ("precision", ["fp16"], '["fp16"]'),
        ("precisions", ["fp32"], '["fp32"]'),
        ("precisions", {}, "{}"),
        ("precisions", {"../../evil": {}}, "{"),
        ("precisions.fp32.model", REMOVED, "missing"),
        ("precisions.fp16.tolerance", 0.5, "0.5"),
        ("precisions.fp16.tolerance.max_relative_difference", float("inf"), "Infinity"),
        ("precisions.fp32.tolerance.mean_cosine", "1", "'1'"),
        ("precisions.fp32.engines", ["e"], '["e"]'),
        ("input.shape", [1, 3, "8", 8], '[1, 3, "8", 8]'),
        ("input.shape", [0, 3, 8, 8], "[0, 3, 8, 8]"),
        ("input.dynamic_batch", REMOVED, "missing"),
        ("output.shape", [1], "[1]"),
        ("files", ["model.onnx"], '["model.onnx"]'),
        ("files", {"a\0b": "0"}, "{"),
        ("target.versions", "ten", "'ten'"),
        ("target.build", {"dla_core": -1}, "-1"),
    ],
)
def test_a_sealed_manifest_of_another_form_is_refused_with_key_found_and_expected(
    bundle, place, value, found
):
    reseal(bundle, place.split("."), value)
    with pytest.raises(BundleError) as caught:
        verify(bundle)
    name = "target.build.dla_core" if found == "-1" else place
    assert f"{bundle / 'manifest.json'}': '{name}' is {found}" in caught.value.problem
    assert ", expected " in caught.value.problem
    assert "export" in caught.value.hint


@pytest.mark.parametrize("depth", [60, 200_000])
def test_a_manifest_nested_without_end_is_refused(bundle, depth):
    path = bundle / "manifest.json"
    path.write_text(
        path.read_text().replace('"made_from": null', '"made_from": ' + "[" * depth + "]" * depth)
    )
    with pytest.raises(BundleError, match=r"manifest\.json' .*more than 50 deep"):
        verify(bundle)


def test_what_is_found_is_told_in_short(bundle):
    reseal(bundle, ["precisions"], ["x" * 500])
    with pytest.raises(BundleError) as caught:
        verify(bundle)
    assert len(caught.value.problem) < len(str(bundle)) + 200
