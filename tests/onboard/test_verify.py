"""Hashes and reference outputs of real bundles, whole and broken."""

import numpy as np
import pytest

from edgecl.onboard.bundle import sha256_of_file
from edgecl.onboard.errors import BundleError, DisagreementError
from edgecl.onboard.verify import compare, verify

from .tiny_bundle import flip_byte, make_bundle, read_manifest, write_manifest


def rehash(bundle):
    manifest = read_manifest(bundle)
    manifest["files"] = {name: sha256_of_file(bundle / name) for name in manifest["files"]}
    write_manifest(bundle, manifest)


@pytest.mark.parametrize(
    "form", [{}, {"batch": 3}, {"batch": 2, "dynamic": True}], ids=["one", "three", "dynamic"]
)
def test_whole_bundle_passes_in_every_form_of_batch(tmp_path, form):
    record = verify(make_bundle(tmp_path / "bundle", **form))
    assert record["ok"]
    assert record["files_ok"]
    assert record["images"] == 5
    assert record["top1_agreement"] == 1.0
    assert record["max_relative_difference"] < 1e-5
    assert record["tolerance"] == {"max_relative_difference": 1e-3, "top1_agreement": 0.99}


@pytest.mark.parametrize("name", ["model.onnx", "reference.npz"])
def test_flipped_byte_is_found(tmp_path, name):
    bundle = make_bundle(tmp_path / "bundle")
    expected = read_manifest(bundle)["files"][name]
    flip_byte(bundle / name)
    with pytest.raises(BundleError) as caught:
        verify(bundle)
    assert caught.value.problem == (
        f"'{name}' does not match its hash: the manifest says {expected[:12]}..., "
        f"the file has {sha256_of_file(bundle / name)[:12]}..."
    )
    assert caught.value.hint == "the file changed after export; export the bundle again"


def test_missing_file_is_named(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"'model\.onnx' is missing from the bundle"):
        verify(bundle)


def test_outputs_of_another_net_are_an_error_with_numbers(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", shift=100.0)
    with pytest.raises(DisagreementError) as caught:
        verify(bundle)
    record = caught.value.record
    assert not record["ok"]
    assert record["max_abs_difference"] == pytest.approx(100.0, rel=1e-5)
    problem = caught.value.problem
    assert "disagrees with torch on 5 reference images" in problem
    assert (
        f"the largest relative difference is {record['max_relative_difference']:.3g}, allowed is 0.001"
        in problem
    )
    assert "top-1 agreement is 0.8, required is 0.99" in problem


def test_a_small_difference_is_named_alone(tmp_path):
    with pytest.raises(DisagreementError) as caught:
        verify(make_bundle(tmp_path / "bundle", shift=0.05))
    assert "the largest relative difference is" in caught.value.problem
    assert "top-1" not in caught.value.problem


def test_a_bundle_without_hashes_is_refused(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    write_manifest(bundle, {**read_manifest(bundle), "files": {}})
    with pytest.raises(BundleError, match=r"the manifest holds no hash for 'model\.onnx'"):
        verify(bundle)


def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    manifest = read_manifest(bundle)
    manifest["files"]["../secret"] = "0" * 64
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match=r"the manifest names '\.\./secret', which is no plain file name"):
        verify(bundle)


def test_a_manifest_without_a_key_is_named(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    manifest = read_manifest(bundle)
    del manifest["tolerance"]
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match="lacks tolerance"):
        verify(bundle)


def test_reference_of_another_size_is_named(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    np.savez(bundle / "reference.npz", inputs=np.zeros((2, 3, 4, 4), np.float32), outputs=np.zeros((2, 6)))
    rehash(bundle)
    with pytest.raises(BundleError, match=r"inputs \(2, 3, 4, 4\).*asks for inputs \(N, 3, 8, 8\)"):
        verify(bundle)


def test_reference_that_needs_unpickling_is_refused(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    np.savez(bundle / "reference.npz", inputs=np.array([{}], dtype=object), outputs=np.zeros((1, 6)))
    rehash(bundle)
    with pytest.raises(BundleError, match="holds no reference inputs and outputs"):
        verify(bundle)


def test_outputs_that_are_not_finite_disagree(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    with np.load(bundle / "reference.npz") as arrays:
        inputs, outputs = arrays["inputs"].copy(), arrays["outputs"]
        inputs[0, 0, 0, 0] = np.inf
        np.savez(bundle / "reference.npz", inputs=inputs, outputs=outputs)
    rehash(bundle)
    with pytest.raises(DisagreementError, match="output holds values that are not finite"):
        verify(bundle)


def test_differences_are_relative_to_the_largest_output():
    found = compare(np.array([[1.0, 8.1], [3.0, 2.0]]), np.array([[1.0, 8.0], [2.0, 3.0]]))
    assert found["max_abs_difference"] == 1.0
    assert found["mean_abs_difference"] == pytest.approx(2.1 / 4)
    assert found["max_relative_difference"] == 1 / 8
    assert found["top1_agreement"] == 0.5


@pytest.mark.parametrize("place", [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path, place):
    bundle = make_bundle(tmp_path / "bundle")
    path = bundle / "manifest.json"
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError):
        verify(bundle)


def test_an_edited_tolerance_is_no_way_round_the_check(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace("0.001", "0.9"))
    with pytest.raises(BundleError, match=r"'manifest\.json' does not match the hash of its own content"):
        verify(bundle)
