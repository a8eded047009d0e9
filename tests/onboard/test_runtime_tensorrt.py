"""The TensorRT session on a fake GPU whose streams do nothing before someone waits for them."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import onnxruntime
import pytest

from edgecl.onboard import cudart
from edgecl.onboard.errors import BundleError, DeviceError
from edgecl.onboard.runtimes import open_session
from edgecl.onboard.tensorrt_session import ENGINES, TensorrtSession
from edgecl.onboard.verify import verify
from onboard.engine_bundle import install, make_engine_bundle
from onboard.fake_cudart import FakeCudart
from onboard.tiny_bundle import SIDE, read_manifest, write_manifest

VERSIONS = ["8.2.1.8", "8.5.2.2", "8.6.2.3", "10.3.0.30", "10.16.2.10", "11.4.1.9"]
PRECISIONS = ["fp32", "fp16", "int8"]
MODES = ["compute, CUDA graph", "compute", "with transfers, CUDA graph", "with transfers"]


def draw(batch):
    return np.random.default_rng(1).normal(size=(batch, 3, SIDE, SIDE)).astype(np.float32)


def of_onnxruntime(bundle, precision, images):
    model = bundle / read_manifest(bundle)["precisions"][precision]["model"]
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(
        None, {"input": images}
    )[0]


@pytest.fixture
def bundle(tmp_path):
    return make_engine_bundle(tmp_path / "bundle")


@pytest.fixture
def session(monkeypatch, bundle):
    """A session of TensorRT 10.3 in fp16."""
    install(monkeypatch, "10.3.0.30")
    return open_(bundle)


def open_(bundle, precision="fp16", **options):
    return TensorrtSession(
        bundle, read_manifest(bundle), precision=precision, threads=1, **{"runtime": "tensorrt", **options}
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_runs_what_the_file_computes(monkeypatch, bundle, version, precision):
    fake, cuda = install(monkeypatch, version)
    session = open_(bundle, precision)
    for image in draw(3)[:, None]:  # another input must give another output
        assert np.array_equal(session.run(image), of_onnxruntime(bundle, precision, image))
    name = "execute_async_v2" if version.startswith("8.2") else "execute_async_v3"
    assert [call for call in fake.calls if call.startswith("execute")] == [name] * 3
    assert session.describe()["settings"]["enqueue"] == name
    session.close()
    assert cuda.live() == 0


@pytest.mark.parametrize("version", VERSIONS[1:])  # the first takes no bytes
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_net_of_bytes_is_given_bytes(monkeypatch, tmp_path, version, precision):
    install(monkeypatch, version)
    bundle = make_engine_bundle(tmp_path / "bundle", raw=True)
    session = open_(bundle, precision)
    images = np.random.default_rng(1).integers(0, 256, (3, 1, SIDE, SIDE, 3), dtype=np.uint8)
    for image in images:
        assert np.array_equal(session.run(image), of_onnxruntime(bundle, precision, image))
    session.bind(images[0])
    assert session.modes() == MODES


def test_an_engine_of_another_type_than_the_manifests_is_refused(monkeypatch, tmp_path):
    install(monkeypatch, VERSIONS[-1])
    bundle = make_engine_bundle(tmp_path / "bundle", raw=True)
    manifest = read_manifest(bundle)
    del manifest["input"]["dtype"]
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match="UINT8"):
        open_(bundle)


@pytest.mark.parametrize("version", VERSIONS)
def test_dynamic_batch_runs_any_number_of_images(monkeypatch, tmp_path, version):
    fake, _ = install(monkeypatch, version)
    bundle = make_engine_bundle(tmp_path / "bundle", batch=2, dynamic=True)
    session = open_(bundle)
    for batch in (2, 1, 2):
        images = draw(batch)
        assert np.array_equal(session.run(images), of_onnxruntime(bundle, "fp16", images))
    shapes = [call for call in fake.calls if call.startswith(("set_input_shape", "set_binding_shape"))]
    prefix = "set_binding_shape(0" if version.startswith("8.2") else "set_input_shape(input"
    assert shapes == [f"{prefix}, ({batch}, 3, 8, 8))" for batch in (2, 1, 2)]


# --- timing ---


@pytest.mark.parametrize("version", ["8.2.1.8", "10.3.0.30", "11.4.1.9"])
def test_each_mode_takes_what_it_names(monkeypatch, bundle, version):
    install(monkeypatch, version)
    session = open_(bundle)
    session.bind(draw(1))
    assert session.modes() == MODES
    # One copy takes 1 ms, the net 4 ms, and 3 ms in a graph.
    assert [session.run_once(mode) for mode in MODES] == pytest.approx([0.003, 0.004, 0.005, 0.006])


def test_timed_runs_compute_the_bound_images(bundle, session):
    images = draw(1)
    session.bind(images)
    expected = of_onnxruntime(bundle, "fp16", images)
    for mode in MODES:
        cudart.array_at(session._host_out, expected.shape)[...] = 0
        session.run_once(mode)
        session._download()
        session.cuda.call("cudaStreamSynchronize", session._stream)
        assert np.array_equal(session._outputs(), expected), mode


@pytest.mark.parametrize(
    ("mode", "moved"), [("compute", False), ("with transfers", True), ("with transfers, CUDA graph", True)]
)
def test_transfers_really_move_the_images(bundle, session, mode, moved):
    other = draw(2)[1:]
    session.bind(draw(1))
    cudart.array_at(session._host_in, other.shape)[...] = other
    session.run_once(mode)
    session._download()
    session.cuda.call("cudaStreamSynchronize", session._stream)
    assert np.array_equal(session._outputs(), of_onnxruntime(bundle, "fp16", other)) == moved


@pytest.mark.parametrize(
    ("lost", "note"),
    [
        (
            False,
            "cudaStreamEndCapture failed with error 901, operation failed due to a previous error during capture",
        ),
        (True, "launched, it computes something else"),
    ],
)
def test_without_a_graph_that_computes_the_same_its_modes_are_left_out(monkeypatch, bundle, lost, note):
    fake, cuda = install(monkeypatch, "10.3.0.30")
    fake.behavior.capturable, cuda.empty_graphs = lost, lost
    session = open_(bundle)
    session.bind(draw(1))
    assert session.modes() == ["compute", "with transfers"]
    assert session.run_once("compute") == pytest.approx(0.004)
    notes = [f"no CUDA graph of '{mode}': {note}" for mode in ("compute", "with transfers")]
    assert session.describe()["settings"]["notes"] == notes
    session.close()
    assert cuda.live() == 0


def test_graphs_of_another_batch_are_dropped(monkeypatch, tmp_path):
    install(monkeypatch, "10.3.0.30")
    session = open_(make_engine_bundle(tmp_path / "bundle", batch=2, dynamic=True))
    session.bind(draw(2))
    assert session.modes() == MODES
    session.run(draw(1))
    assert session.modes() == ["compute", "with transfers"]


def test_a_mode_that_is_not_there(session):
    with pytest.raises(DeviceError, match="cannot time 'compute'") as caught:
        session.run_once("compute")
    assert "bind a batch" in caught.value.hint


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 3, 9, 8), (1, 1, 8, 8)])
def test_a_batch_of_another_shape(session, shape):
    with pytest.raises(DeviceError) as caught:
        session.run(np.zeros(shape, np.float32))
    assert f"shape (1, 3, 8, 8), not {shape}" in caught.value.problem


# --- the engine that is kept ---


def test_second_session_loads_the_kept_engine(monkeypatch, bundle):
    fake, _ = install(monkeypatch, "10.3.0.30")
    first = open_(bundle).describe()["engine"]
    second = open_(bundle).describe()["engine"]
    assert (first.pop("cached"), second.pop("cached")) == (False, True)
    assert first == second
    assert fake.calls.count("build_serialized_network") == 1
    assert first["sha256"] == hashlib.sha256((bundle / first["file"]).read_bytes()).hexdigest()
    assert first["layers"] == {"fp16": 6}
    assert re.fullmatch(
        rf"{ENGINES}/engine-fp16-orin-sm87-8mp-tensorrt-10-3-0-30-\w{{12}}\.plan", first["file"]
    )
    assert sorted(path.suffix for path in (bundle / ENGINES).iterdir()) == [".cache", ".json", ".plan"]


@pytest.mark.parametrize("change", ["version", "device", "build"])
def test_another_device_version_or_build_gets_its_own_engine(monkeypatch, bundle, change):
    install(monkeypatch, "10.3.0.30")
    first = open_(bundle).describe()["engine"]["file"]
    if change == "version":
        install(monkeypatch, "10.3.1.1")
    elif change == "device":
        install(monkeypatch, "10.3.0.30", cuda=FakeCudart(gpu=b"NVIDIA Thor", capability=(11, 0)))
    else:
        manifest = read_manifest(bundle)
        manifest["target"]["build"]["workspace_mib"] = 64
        write_manifest(bundle, manifest)
    about = open_(bundle).describe()["engine"]
    assert about["file"] != first
    assert about["cached"] is False


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda plan: plan.write_bytes(plan.read_bytes()[:-3]), "the file changed since it was built"),
        (lambda plan: plan.with_suffix(".json").unlink(), "its record is missing or damaged"),
        (lambda plan: plan.with_suffix(".json").write_text('{"sha256":'), "its record is missing or damaged"),
        (
            lambda plan: swap(plan, b"10.3.0.30", b"10.3.0.29"),
            "does not load it: Version tag does not match.",
        ),
    ],
)
def test_kept_engine_that_is_no_good_is_built_again_and_said_so(monkeypatch, bundle, harm, said):
    install(monkeypatch, "10.3.0.30")
    images = draw(1)
    plan = bundle / open_(bundle).describe()["engine"]["file"]
    harm(plan)
    lines = []
    session = open_(bundle, report=lines.append)
    assert f"building '{plan.name}' again: " in lines[0]
    assert said in lines[0]
    assert session.describe()["settings"]["notes"] == lines[:1]
    assert np.array_equal(session.run(images), of_onnxruntime(bundle, "fp16", images))
    assert open_(bundle).describe()["engine"]["cached"] is True


def swap(plan, old, new):
    """An engine of another version, under this version's name, whole."""
    content = plan.read_bytes().replace(old, new)
    plan.write_bytes(content)
    record = json.loads(plan.with_suffix(".json").read_text())
    record["sha256"] = hashlib.sha256(content).hexdigest()
    plan.with_suffix(".json").write_text(json.dumps(record))


def test_a_bundle_that_cannot_be_written_to_still_runs(monkeypatch, bundle):
    install(monkeypatch, "10.3.0.30")
    (bundle / ENGINES).write_text("in the way")
    session = open_(bundle)
    images = draw(1)
    assert np.array_equal(session.run(images), of_onnxruntime(bundle, "fp16", images))
    assert session.describe()["engine"]["file"] is None
    assert session.describe()["settings"]["notes"][0].startswith("the engine is not kept: ")


def test_timing_cache_of_one_precision_serves_the_next(monkeypatch, bundle):
    fake, _ = install(monkeypatch, "10.3.0.30")
    for precision in PRECISIONS:
        open_(bundle, precision)
    sizes = [call.partition("(")[2].partition(" ")[0] for call in fake.calls if call.startswith("set_timing")]
    assert sizes == ["0", "7", "7"]


# --- not delivered ---


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("asked", "got"), [("fp16", "fp32"), ("int8", "fp16")])
def test_a_precision_that_is_not_delivered_is_an_error(monkeypatch, bundle, version, asked, got):
    fake, cuda = install(monkeypatch, version)
    fake.behavior.delivered = got
    words = rf"^asked for {asked} and not delivered: TensorRT {version} computes 0 % .* \({got} 100 %\)$"
    with pytest.raises(DeviceError, match=words):
        open_(bundle, asked)
    assert not (bundle / ENGINES).exists()
    assert cuda.live() == 0


def test_an_engine_that_tells_nothing_is_noted(monkeypatch, bundle):
    fake, _ = install(monkeypatch, "8.5.2.2")
    fake.behavior.names_only = True
    about = open_(bundle).describe()
    assert about["engine"]["precision_checked"] is False
    assert about["engine"]["layers"] == {"unknown": 6}
    assert about["settings"]["notes"] == ["the engine does not tell the precision of its layers"]


# --- failures give everything back ---


@pytest.mark.parametrize("version", ["8.2.1.8", "10.3.0.30"])
def test_no_memory_for_a_context_or_halfway_through_the_buffers(monkeypatch, bundle, version):
    fake, cuda = install(monkeypatch, version)
    cuda.fail["cudaHostAlloc"] = 2
    with pytest.raises(DeviceError, match=r"cudaHostAlloc .*error 2, out of memory"):
        open_(bundle)
    fake.behavior.context = False
    with pytest.raises(DeviceError, match="execution context: Requested amount of GPU"):
        open_(bundle)
    assert cuda.live() == 0


def test_after_a_failure_on_the_gpu_closing_does_not_hide_it(monkeypatch, bundle):
    _, cuda = install(monkeypatch, "10.3.0.30")
    session = open_(bundle)
    session.bind(draw(1))
    free = ("cudaFree", "cudaFreeHost", "cudaGraphExecDestroy", "cudaStreamDestroy")
    cuda.fail = dict.fromkeys(("cudaStreamSynchronize", *free), 700)
    with pytest.raises(DeviceError, match="cudaStreamSynchronize failed with error 700"):
        session.run(draw(1))
    session.close()
    session.close()
    with pytest.raises(DeviceError, match="the session is closed"):
        session.run(draw(1))


def test_the_net_does_not_run(monkeypatch, bundle):
    fake, _ = install(monkeypatch, "10.3.0.30")
    session = open_(bundle)

    def refuse(stream_handle):
        fake.say(
            "ERROR", "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (invalid resource handle)"
        )
        return False

    monkeypatch.setattr(session._context, "execute_async_v3", refuse)
    with pytest.raises(DeviceError, match=r"cannot run the net: .*enqueueV3: Error Code 1"):
        session.run(draw(1))


# --- through the front door ---


def test_verify_runs_a_bundle_with_tensorrt(monkeypatch, bundle):
    _, cuda = install(monkeypatch, "10.3.0.30")
    record = verify(bundle, precisions=["fp32", "fp16"])
    assert (record["ok"], record["runtime"]) == (True, "tensorrt 10.3.0.30")
    assert cuda.live() == 0
    about = open_session(bundle, read_manifest(bundle), precision="int8", threads=2).describe()
    assert (about["precision"], about["threads"]) == ("int8", 2)
    assert about["versions"]["cuda_runtime"] == "12.6"
    assert json.loads(json.dumps(about)) == about


# --- engines that a bundle for TensorRT for RTX carries ---


@pytest.fixture
def rtx(monkeypatch, bundle):
    """A bundle with one engine for SM86 and SM89 of version 11.0.0.0, and a machine that has them."""
    import sys

    fake, cuda = install(
        monkeypatch, "11.0.0.0", cuda=FakeCudart(gpu=b"RTX 4060", capability=(8, 9), integrated=0)
    )
    fake.__name__ = "tensorrt_rtx"
    kept = bundle / open_(bundle).describe()["engine"]["file"]
    (bundle / "engine-fp16.plan").write_bytes(kept.read_bytes())
    manifest = read_manifest(bundle)
    manifest["runtime"] = "tensorrt_rtx"
    manifest["precisions"]["fp16"]["engines"] = {
        "engine-fp16.plan": {
            "version": "11.0.0.0",
            "compute_capabilities": ["SM86", "SM89"],
            "compile_s": 0.4,
            "engine": {"layers": {"fp16": 6}, "shares": {"fp16": 1.0}},
        }
    }
    write_manifest(bundle, manifest)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    return bundle, fake, cuda


def test_carried_engine_runs(rtx):
    bundle, fake, _ = rtx
    built = fake.calls.count("build_serialized_network")
    session = open_(bundle, runtime="tensorrt_rtx")
    images = draw(1)
    assert np.array_equal(session.run(images), of_onnxruntime(bundle, "fp16", images))
    about = session.describe()
    assert about["runtime"] == "tensorrt_rtx 11.0.0.0"
    assert about["engine"]["file"] == "engine-fp16.plan"
    assert about["engine"]["layers"] == {"fp16": 6}
    assert fake.calls.count("build_serialized_network") == built


@pytest.mark.parametrize("change", ["version", "gpu", "precision"])
def test_carried_engine_for_something_else(rtx, change):
    bundle, fake, cuda = rtx
    if change == "version":
        fake.__version__ = "11.0.1.0"
    elif change == "gpu":
        cuda.capability = (9, 0)
    precision = "int8" if change == "precision" else "fp16"
    has = "none" if change == "precision" else "'engine-fp16.plan' (11.0.0.0 for SM86, SM89)"
    capability = "9.0" if change == "gpu" else "8.9"
    with pytest.raises(DeviceError) as caught:
        open_(bundle, precision, runtime="tensorrt_rtx")
    for words in (f"no {precision} engine", f"RTX {fake.__version__} ", f"capability {capability};"):
        assert words in caught.value.problem
    assert caught.value.problem.endswith(f"it has {has}")


@pytest.mark.parametrize("name", ["engine-fp16.plan", "../other.plan"])
def test_carried_engine_that_is_missing_or_outside_the_bundle_is_not_read(rtx, tmp_path, name):
    bundle, _, _ = rtx
    (bundle / "engine-fp16.plan").rename(tmp_path / "other.plan")
    manifest = read_manifest(bundle)
    engines = manifest["precisions"]["fp16"]["engines"]
    engines[name] = engines.pop("engine-fp16.plan")
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match=re.escape(f"'{name}' is missing from the bundle")):
        open_(bundle, runtime="tensorrt_rtx")
