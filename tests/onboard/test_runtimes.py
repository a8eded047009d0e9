"""The sessions for processors on real nets."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import edgecl
from edgecl.onboard.errors import BundleError, DeviceError
from edgecl.onboard.runtimes import RUNTIMES, open_session

from .tiny_bundle import make_bundle, read_manifest

BOTH = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])


@pytest.fixture
def several(tmp_path):
    return make_bundle(tmp_path / "several", precisions=("fp16", "fp32", "int8"))


def reference(bundle):
    with np.load(bundle / "reference.npz") as arrays:
        return arrays["inputs"], arrays["outputs"]


@BOTH
def test_every_precision_runs_its_own_file(several, runtime):
    images, expected = reference(several)
    manifest = read_manifest(several)
    outputs = {}
    for precision in ("fp32", "fp16", "int8"):
        session = open_session(several, manifest, precision=precision, runtime=runtime, threads=1)
        outputs[precision] = session.run(images[:1])
        assert session.describe()["precision"] == precision
        session.close()
    np.testing.assert_allclose(outputs["fp32"], expected[:1], rtol=1e-4, atol=1e-5)
    assert (
        0 < np.abs(outputs["fp16"] - outputs["fp32"]).max() < np.abs(outputs["int8"] - outputs["fp32"]).max()
    )


def test_a_session_of_onnxruntime_describes_its_conditions(several):
    about = open_session(several, read_manifest(several), threads=1).describe()
    assert about["runtime"].startswith("onnxruntime ")
    assert about["runtime"].endswith(" CPUExecutionProvider")
    assert (about["precision"], about["threads"]) == ("fp16", 1)  # the manifest's
    assert about["settings"]["intra_op_num_threads"] == about["settings"]["inter_op_num_threads"] == 1
    assert about["settings"]["intra_op_spinning"] is True
    assert set(about["versions"]) == {"onnxruntime"}


@BOTH
def test_a_static_batch_and_a_dynamic_one_run(tmp_path, runtime):
    for name, form in (("three", {"batch": 3}), ("dynamic", {"batch": 2, "dynamic": True})):
        bundle = make_bundle(tmp_path / name, **form)
        images, expected = reference(bundle)
        session = open_session(bundle, read_manifest(bundle), runtime=runtime, threads=1)
        size = form["batch"]
        np.testing.assert_allclose(session.run(images[:size]), expected[:size], rtol=1e-4, atol=1e-5)
        if name == "dynamic":
            np.testing.assert_allclose(session.run(images[:1]), expected[:1], rtol=1e-4, atol=1e-5)


@BOTH
def test_a_net_on_another_device_than_asked_is_refused(bundle, monkeypatch, runtime):
    session = RUNTIMES[runtime].open
    load = session._load
    monkeypatch.setattr(session, "_load", lambda *words: load(*words)._replace(devices=["GPU.0", "CPU"]))
    with pytest.raises(DeviceError, match=rf"'model\.onnx' on GPU\.0, CPU, asked .*{session.device}"):
        open_session(bundle, read_manifest(bundle), runtime=runtime, threads=1)


def test_openvino_computes_float32_nets_in_float32(several):
    """Left to itself it takes bf16 where the processor has it."""
    manifest = read_manifest(several)
    about = open_session(several, manifest, precision="fp32", runtime="openvino", threads=1).describe()
    assert about["runtime"].startswith("openvino 2")
    assert about["runtime"].endswith(" CPU")
    settings = about["settings"]
    assert settings["inference_precision"] == "f32"
    assert settings["inference_num_threads"] == settings["num_streams"] == 1
    assert settings["layers"]["f32"] >= 3
    assert not {"bf16", "f16"} & set(settings["layers"])
    assert set(about["versions"]) == {"openvino"}


def test_openvino_says_which_precision_a_half_net_really_gets(several):
    import openvino

    has_half = "FP16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    about = open_session(several, read_manifest(several), runtime="openvino", threads=1).describe()
    assert about["precision"] == "fp16"
    assert about["settings"]["inference_precision"] == ("f16" if has_half else "f32")
    assert ("f16" in about["settings"]["layers"]) is has_half


def test_opening_one_runtime_imports_no_other(bundle):
    code = (
        "import json, sys; from edgecl.onboard.runtimes import open_session; "
        "manifest = json.load(open(sys.argv[1] + '/manifest.json')); "
        "open_session(sys.argv[1], manifest, threads=1); "
        "print([name for name in ('openvino', 'tensorrt', 'torch', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(edgecl.__file__).parents[1],
    )
    assert done.stdout == "[]\n"


@BOTH
def test_a_bound_run_computes_the_bound_images(bundle, runtime):
    session = open_session(bundle, read_manifest(bundle), runtime=runtime, threads=1)
    images = np.random.default_rng(5).normal(size=(1, 3, 8, 8)).astype(np.float32)
    expected = session.run(images)
    assert np.abs(session.run(np.zeros_like(images)) - expected).max() > 0.01
    session.bind(images)
    assert session.run_once("inference") is None  # the clock times the call
    found = (
        session._binding.copy_outputs_to_cpu()[0]
        if runtime == "onnxruntime"
        else session._request.get_output_tensor().data
    )
    np.testing.assert_array_equal(found, expected)


@BOTH
def test_missing_runtime_names_its_installation(bundle, monkeypatch, runtime):
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(DeviceError, match=f"'{runtime}' cannot be imported") as caught:
        open_session(bundle, read_manifest(bundle), runtime=runtime, threads=1)
    # Exact, for it is a command to copy.
    assert caught.value.hint == f"pip install {runtime}"


def test_unknown_runtime_is_named_with_the_known(bundle):
    manifest = {**read_manifest(bundle), "runtime": "tflite"}
    with pytest.raises(DeviceError, match=r"'tflite';.*: onnxruntime, openvino, tensorrt, tensorrt_rtx$"):
        open_session(bundle, manifest, threads=1)


@BOTH
def test_a_file_of_another_kind_is_refused(bundle, runtime):
    """A runtime guesses by the suffix what a file is: OpenVINO would read the weights of an .xml from beside it."""
    manifest = read_manifest(bundle)
    manifest["precisions"]["fp32"]["model"] = "model.xml"
    with pytest.raises(BundleError, match=r"'model\.xml' is no \*\.onnx file"):
        open_session(bundle, manifest, runtime=runtime, threads=1)


@BOTH
def test_a_net_that_the_runtime_does_not_know_is_named(bundle, runtime):
    model = onnx.load(bundle / "model.onnx")
    model.graph.node[1].op_type = "Relive"
    onnx.save(model, bundle / "model.onnx")
    with pytest.raises(DeviceError, match=rf"{runtime} [\d.]+ cannot load 'model\.onnx': ") as caught:
        open_session(bundle, read_manifest(bundle), runtime=runtime, threads=1)
    assert "Relive" in caught.value.problem


@BOTH
@pytest.mark.parametrize("end", ["input", "output"])
def test_another_input_or_output_than_the_manifests_is_named(bundle, runtime, end):
    manifest = read_manifest(bundle)
    manifest[end]["name"] = "pixels"
    with pytest.raises(BundleError, match=rf"{end}s \[.*'{end}'.*\], .*manifest .*'pixels'"):
        open_session(bundle, manifest, runtime=runtime, threads=1)


@BOTH
def test_a_batch_the_net_does_not_take_is_named(bundle, runtime):
    session = open_session(bundle, read_manifest(bundle), runtime=runtime, threads=1)
    with pytest.raises(DeviceError, match=r"cannot run .* \(2, 3, 8, 8\)"):
        session.bind(np.zeros((2, 3, 8, 8), np.float32))
