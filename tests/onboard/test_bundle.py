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


@pytest.mark.parametrize("schema", [SCHEMA - 1, 99])
def test_another_schema_is_refused_with_both(bundle, schema):
    write_manifest(bundle, {**read_manifest(bundle), "schema": schema})
    with pytest.raises(BundleError, match=f"has schema {schema}, this edgecl reads {SCHEMA}"):
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
    ("place", "value", "problem"),
    [
        (["schema"], "1", "'schema' is '1', expected a whole number"),
        (["schema"], True, "'schema' is true, expected a whole number"),
        (["schema"], REMOVED, "'schema' is missing, expected a whole number"),
        (["runtime"], 7, "'runtime' is 7, expected the name of a runtime"),
        (["precision"], "int8", "'precision' is 'int8', expected one of its precisions, fp16, fp32"),
        (["precision"], ["fp16"], """'precision' is ["fp16"], expected one of its precisions, fp16, fp32"""),
        (["precisions"], ["fp32"], """'precisions' is ["fp32"], expected an object of precisions"""),
        (["precisions"], {}, "'precisions' is {}, expected an object of precisions"),
        (
            ["precisions", "../../evil"],
            {},
            "'precisions' is '../../evil', expected names out of fp32, fp16, int8",
        ),
        (["precisions", "fp32"], "model.onnx", "'precisions.fp32' is 'model.onnx', expected an object"),
        (
            ["precisions", "fp32", "model"],
            ["m"],
            """'precisions.fp32.model' is ["m"], expected the name of a file""",
        ),
        (["precisions", "fp32", "form"], None, "'precisions.fp32.form' is missing, expected a text"),
        (
            ["precisions", "fp16", "tolerance"],
            {},
            "'precisions.fp16.tolerance.max_relative_difference' is missing, expected a number",
        ),
        (["precisions", "fp16", "tolerance"], 0.5, "'precisions.fp16.tolerance' is 0.5, expected an object"),
        (
            ["precisions", "fp16", "tolerance", "top1_agreement"],
            "0.9",
            "'precisions.fp16.tolerance.top1_agreement' is '0.9', expected a number",
        ),
        (
            ["precisions", "fp16", "tolerance", "max_relative_difference"],
            float("inf"),
            "'precisions.fp16.tolerance.max_relative_difference' is Infinity, expected a number",
        ),
        (
            ["precisions", "fp32", "tolerance", "mean_cosine"],
            None,
            "'precisions.fp32.tolerance.mean_cosine' is missing, expected a number",
        ),
        (
            ["precisions", "fp32", "engines"],
            ["e"],
            """'precisions.fp32.engines' is ["e"], expected an object of objects""",
        ),
        (["input"], [1, 3, 8, 8], "'input' is [1, 3, 8, 8], expected an object"),
        (
            ["input", "shape"],
            REMOVED,
            "'input.shape' is missing, expected [batch, channels, height, width], whole numbers from 1",
        ),
        (
            ["input", "shape"],
            [1, 3, "8", 8],
            """'input.shape' is [1, 3, "8", 8], expected [batch, channels, height, width], whole numbers from 1""",
        ),
        (
            ["input", "shape"],
            [0, 3, 8, 8],
            "'input.shape' is [0, 3, 8, 8], expected [batch, channels, height, width], whole numbers from 1",
        ),
        (["input", "name"], 1, "'input.name' is 1, expected a text"),
        (["input", "dynamic_batch"], REMOVED, "'input.dynamic_batch' is missing, expected true or false"),
        (["input", "max_batch"], 0, "'input.max_batch' is 0, expected a whole number from 1"),
        (["output", "shape"], [1], "'output.shape' is [1], expected [batch, features], whole numbers from 1"),
        (["files"], ["model.onnx"], """'files' is ["model.onnx"], expected an object of names and hashes"""),
        (["files", "model.onnx"], None, "'files.model.onnx' is missing, expected a hash"),
        (["files", "a\0b"], "0", "'files' is 'a\\x00b', expected names of files"),
        (["target"], "ort-cpu", "'target' is 'ort-cpu', expected an object"),
        (["target", "runtime"], REMOVED, "'target.runtime' is missing, expected the name of a runtime"),
        (["target", "build"], [], "'target.build' is [], expected an object"),
    ],
)
def test_a_sealed_manifest_of_another_form_is_refused_with_key_found_and_expected(
    bundle, place, value, problem
):
    reseal(bundle, place, value)
    with pytest.raises(BundleError) as caught:
        verify(bundle)
    assert caught.value.problem == f"'{bundle / 'manifest.json'}': {problem}"
    assert caught.value.hint == "export the bundle again"


@pytest.mark.parametrize("depth", [60, 200_000])
def test_a_manifest_nested_without_end_is_refused(bundle, depth):
    path = bundle / "manifest.json"
    path.write_text(
        path.read_text().replace('"made_from": null', '"made_from": ' + "[" * depth + "]" * depth)
    )
    with pytest.raises(
        BundleError, match=r"manifest\.json' is nested more than 50 deep, which no bundle is$"
    ):
        verify(bundle)


def test_what_is_found_is_told_in_short(bundle):
    reseal(bundle, ["precisions"], ["x" * 500])
    with pytest.raises(BundleError) as caught:
        verify(bundle)
    assert len(caught.value.problem) < len(str(bundle)) + 200
