"""Hashes and reference outputs of real bundles, whole and broken."""

import re

import numpy as np
import pytest

from edgecl.onboard.bundle import sha256_of_file
from edgecl.onboard.errors import BundleError, DisagreementError
from edgecl.onboard.verify import compare, verify

from .tiny_bundle import make_bundle, read_manifest, write_manifest

NPY = b"\x93NUMPY\x01\x00"


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
    assert record["runtime"].startswith("onnxruntime ")
    numbers = record["precisions"].pop("fp32")
    assert record["precisions"] == {}
    assert numbers["ok"]
    assert numbers["top1_agreement"] == 1.0
    assert numbers["max_relative_difference"] < 1e-5
    assert numbers["mean_cosine"] == pytest.approx(1.0)
    assert numbers["tolerance"] == {"max_relative_difference": 1e-3, "top1_agreement": 0.99}


def test_every_precision_is_held_to_its_own_tolerance(tmp_path):
    found = verify(make_bundle(tmp_path / "bundle", precisions=("fp16", "fp32", "int8")))["precisions"]
    assert list(found) == ["fp16", "fp32", "int8"]
    assert all(numbers["ok"] for numbers in found.values())
    differences = [found[name]["max_relative_difference"] for name in ("fp32", "fp16", "int8")]
    assert differences == sorted(differences)
    assert differences[2] > 1e-3  # more than fp32 is allowed
    assert [found[name]["tolerance"]["max_relative_difference"] for name in found] == [0.02, 0.001, 0.5]


def test_one_precision_out_of_several_that_disagrees_is_named_and_the_rest_is_kept(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", precisions=("fp32", "int8"))
    manifest = read_manifest(bundle)
    manifest["precisions"]["int8"]["tolerance"]["max_relative_difference"] = 1e-4
    write_manifest(bundle, manifest)
    with pytest.raises(DisagreementError) as caught:
        verify(bundle)
    record = caught.value.record
    assert (record["ok"], record["files_ok"]) == (False, True)
    assert [record["precisions"][name]["ok"] for name in ("fp32", "int8")] == [True, False]
    assert "int8: the largest relative difference" in caught.value.problem
    assert "fp32" not in caught.value.problem


def test_outputs_of_another_net_are_an_error_with_numbers(tmp_path):
    with pytest.raises(DisagreementError) as caught:
        verify(make_bundle(tmp_path / "bundle", shift=100.0))
    record = caught.value.record
    numbers = record["precisions"]["fp32"]
    assert (record["ok"], numbers["ok"]) == (False, False)
    assert numbers["max_abs_difference"] == pytest.approx(100.0, rel=1e-5)
    found = re.escape(f"{numbers['max_relative_difference']:.3g}")
    words = rf"^{record['runtime']} .* 5 .*fp32: .*difference is {found}, .*0\.001, .*top-1 .*0\.8, .*0\.99$"
    assert re.search(words, caught.value.problem)


def test_a_small_difference_is_named_alone(tmp_path):
    with pytest.raises(DisagreementError) as caught:
        verify(make_bundle(tmp_path / "bundle", shift=0.05))
    assert "fp32: the largest relative difference" in caught.value.problem
    assert "top-1" not in caught.value.problem


def test_outputs_that_are_not_finite_disagree(bundle):
    with np.load(bundle / "reference.npz") as arrays:
        inputs, outputs = arrays["inputs"].copy(), arrays["outputs"]
        inputs[0, 0, 0, 0] = np.inf
        np.savez(bundle / "reference.npz", inputs=inputs, outputs=outputs)
    rehash(bundle)
    with pytest.raises(DisagreementError, match="fp32: some outputs are not finite"):
        verify(bundle)


def test_differences_are_relative_to_the_largest_output():
    found = compare(np.array([[1.0, 8.1], [3.0, 2.0]]), np.array([[1.0, 8.0], [2.0, 3.0]]))
    assert found["max_abs_difference"] == 1.0
    assert found["mean_abs_difference"] == pytest.approx(2.1 / 4)
    assert found["max_relative_difference"] == 1 / 8
    assert found["top1_agreement"] == 0.5


def test_outputs_of_another_shape_disagree(bundle):
    with np.load(bundle / "reference.npz") as arrays:
        np.savez(bundle / "reference.npz", inputs=arrays["inputs"], outputs=arrays["outputs"][:, :4])
    manifest = read_manifest(bundle)
    manifest["output"]["shape"] = [1, 4]
    write_manifest(bundle, manifest)
    rehash(bundle)
    with pytest.raises(DisagreementError, match=r"fp32: .*shape \(5, 6\), torch.* \(5, 4\)"):
        verify(bundle)


def test_cosine_is_that_of_the_directions():
    a = np.array([[1.0, 0.0], [2.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    b = np.array([[0.0, 3.0], [5.0, 5.0], [0.0, 0.0], [1.0, 0.0]])
    assert compare(a, b)["mean_cosine"] == pytest.approx((0 + 1 + 1 + 0) / 4)
    assert compare(-b, b)["mean_cosine"] == pytest.approx((-1 - 1 + 1 - 1) / 4)


@pytest.mark.parametrize("content", [b"", NPY], ids=["empty", "bare array"])
def test_reference_that_is_no_archive_is_refused(bundle, content):
    (bundle / "reference.npz").write_bytes(content)
    rehash(bundle)
    with pytest.raises(BundleError, match=r"no reference inputs .*zip"):
        verify(bundle)


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        (np.zeros((2, 3, 4, 4)), np.zeros((2, 6)), r"inputs \(2, 3, 4, 4\).*asks for inputs \(N, 3, 8, 8\)"),
        (np.zeros((1, 3, 8, 8)), np.full((1, 6), np.nan), "outputs that are not finite"),
        (np.zeros((1, 3, 8, 8)), np.zeros((1, 0)), r"outputs \(1, 0\); .* outputs \(N, 6\)$"),
        (np.array([{}], dtype=object), np.zeros((1, 6)), "holds no reference inputs and outputs"),
    ],
    ids=["another size", "not finite", "no outputs", "pickled"],
)
def test_reference_that_no_net_can_be_held_to_is_refused(bundle, inputs, outputs, why):
    np.savez(bundle / "reference.npz", inputs=inputs, outputs=outputs)
    rehash(bundle)
    with pytest.raises(BundleError, match=why):
        verify(bundle)
