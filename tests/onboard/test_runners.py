"""The ONNX Runtime runner on a real net."""

import sys

import numpy as np
import pytest

from edgecl.onboard.errors import BundleError, DeviceError
from edgecl.onboard.runners import open_runner

from .tiny_bundle import make_bundle, read_manifest


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


def test_runner_describes_its_conditions(bundle):
    about = open_runner(bundle, read_manifest(bundle), threads=1).describe()
    assert about["runtime"].startswith("onnxruntime ")
    assert about["runtime"].endswith(" CPUExecutionProvider")
    assert (about["precision"], about["threads"]) == ("fp32", 1)
    assert about["settings"]["intra_op_num_threads"] == 1
    assert about["settings"]["inter_op_num_threads"] == 1
    assert about["settings"]["intra_op_spinning"] is True
    assert set(about["versions"]) == {"onnxruntime", "numpy"}


def test_bound_run_computes_the_bound_images(bundle):
    runner = open_runner(bundle, read_manifest(bundle), threads=1)
    images = np.random.default_rng(5).normal(size=(1, 3, 8, 8)).astype(np.float32)
    expected = runner.run(images)
    runner.bind(images)
    runner.run_once()
    np.testing.assert_array_equal(runner._binding.copy_outputs_to_cpu()[0], expected)


def test_missing_runtime_names_its_installation(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match="the runtime 'onnxruntime' cannot be imported") as caught:
        open_runner(bundle, read_manifest(bundle), threads=1)
    assert caught.value.hint == "pip install onnxruntime"


def test_unknown_runtime_is_named_with_the_known(bundle):
    manifest = {**read_manifest(bundle), "runtime": "tensorrt"}
    with pytest.raises(
        DeviceError, match="no runner for the runtime 'tensorrt'; this edgecl has: onnxruntime"
    ):
        open_runner(bundle, manifest, threads=1)


def test_a_file_that_is_no_net_is_named(bundle):
    (bundle / "model.onnx").write_bytes(b"not a net")
    with pytest.raises(DeviceError, match=r"onnxruntime [\d.]+ cannot load 'model.onnx'"):
        open_runner(bundle, read_manifest(bundle), threads=1)


def test_another_input_than_the_manifests_is_named(bundle):
    manifest = read_manifest(bundle)
    manifest["input"]["name"] = "pixels"
    with pytest.raises(BundleError, match=r"has the inputs \['input'\], the manifest says 'pixels'"):
        open_runner(bundle, manifest, threads=1)


def test_a_batch_the_net_does_not_take_is_named(bundle):
    runner = open_runner(bundle, read_manifest(bundle), threads=1)
    with pytest.raises(DeviceError, match=r"cannot run the net on inputs \(2, 3, 8, 8\)"):
        runner.bind(np.zeros((2, 3, 8, 8), np.float32))
