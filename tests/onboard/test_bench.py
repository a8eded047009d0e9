"""Whole measurements: of real nets on the processor, of the fake GPU's modes, and of a fake trtexec."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import edgecl.onboard.bench
from edgecl.onboard import clock
from edgecl.onboard.bench import _marks_of_conditions, bench
from edgecl.onboard.errors import BundleError
from edgecl.onboard.power import PowerMeter
from edgecl.onboard.runtimes.onnxruntime import OrtSession
from edgecl.onboard.throttle import ThrottleWatch

from .engine_bundle import install, make_engine_bundle
from .fake_trtexec import make_trtexec
from .recorded.boards import BOARDS, plant
from .test_throttle import CALM, COOLING, OC
from .tiny_bundle import make_bundle, read_manifest, write_manifest

ALL = ("fp16", "fp32", "int8")
MODES = ["compute, CUDA graph", "compute", "with transfers, CUDA graph", "with transfers"]


@pytest.fixture(autouse=True)
def quick_warm_up(monkeypatch):
    """Windows of milliseconds: what is tested here is the record."""
    monkeypatch.setattr(clock, "WINDOW_S", 0.01)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A record of three precisions in turn, and the lines told."""
    bundle = make_bundle(tmp_path_factory.mktemp("bench") / "bundle", precisions=ALL)
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "WINDOW_S", 0.01)
        record = bench(bundle, precisions=ALL, duration_s=0.3, threads=1, report=lines.append)
    return record, lines


def test_record_is_json_and_begins_with_its_conditions(measured):
    record, lines = measured
    assert lines[:3] == ["loading fp16", "loading fp32", "loading int8"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["runtime"].startswith("onnxruntime ")
    assert (record["batch"], record["threads"], record["duration_asked_s"]) == (1, 1, 0.3)
    assert record["device"]["threads"] == 1
    assert record["device"]["clocks"]["after"] is not None
    assert record["device"]["temperatures_c"]["after"] is not None
    assert record["command"].split()
    assert record["throttle"]["looks"] >= 9  # three in a round; a busy machine has few rounds
    throttled = record["throttle"]["marks"]
    assert record["marks"][: len(throttled)] == throttled
    assert all(mark.startswith("busy: a load of ") for mark in record["marks"][len(throttled) :])


def test_every_precision_has_its_measurement(measured):
    measurements = measured[0]["measurements"]
    assert [one["precision"] for one in measurements] == ["fp16", "fp32", "int8"]
    assert [one["form"] for one in measurements] == ["fp16", "fp32", "int8-cpu"]
    for one in measurements:
        assert (one["mode"], one["headline"], one["engine"]) == ("inference", True, None)
        assert one["samples"] >= 1024
        assert one["duration_s"] >= 0.3
        assert one["warmup_samples"] >= 1
        assert isinstance(one["steady"], bool)
        assert ("unsteady" in one["marks"]) is not one["steady"]
        latency = one["latency_ms"]
        assert 0 < latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p99"]
        for name in ("p50", "p90", "p99"):
            low, high = latency["ci95_" + name]
            assert low <= latency[name] <= high
        assert one["throughput_per_s"] == pytest.approx(1e3 / latency["mean"], rel=0.01)
        assert one["cov"] == pytest.approx(latency["std"] / latency["mean"], rel=0.01)
        assert one["settings"]["intra_op_num_threads"] == 1


def test_ratios_are_of_a_higher_to_a_lower_precision_from_paired_rounds(measured):
    ratios = measured[0]["ratios"]
    assert [(one["a"], one["b"]) for one in ratios] == [("fp32", "fp16"), ("fp32", "int8"), ("fp16", "int8")]
    for one in ratios:
        assert one["mode"] == "inference"
        assert one["rounds"] >= 4
        assert one["ci95"][0] <= one["p50_ratio"] <= one["ci95"][1]


@pytest.mark.parametrize(("asked", "measured"), [(None, ["fp16"]), (["int8", "int8"], ["int8"])])
def test_one_precision_has_no_ratio_even_named_twice(tmp_path, asked, measured):
    bundle = make_bundle(tmp_path / "b", precisions=ALL)
    record = bench(bundle, precisions=asked, duration_s=0.05, threads=1, power=False)
    assert [one["precision"] for one in record["measurements"]] == measured
    assert record["ratios"] == []
    assert record["power"] == {"source": None, "rails": [], "reason": "not asked for"}


def test_energy_is_sampled_beside_the_run(tmp_path, monkeypatch):
    board = BOARDS["orin-nano"]
    root = plant(tmp_path / "root", board.files)
    monkeypatch.setattr(edgecl.onboard.bench, "PowerMeter", functools.partial(PowerMeter, root=root))
    lines = []
    record = bench(make_bundle(tmp_path / "b"), duration_s=1.0, threads=1, report=lines.append)
    assert lines[0] == "measuring idle power"
    measurement = record["measurements"][0]
    energy = measurement["energy"]
    assert energy["rails"] == record["power"]["rails"] == list(board.rails)
    assert energy["source"] == record["power"]["source"] == "ina3221"
    assert energy["load_w"] == energy["idle_w"] == pytest.approx(board.sysfs_w, abs=1e-3)
    expected = board.sysfs_w * measurement["duration_s"] / measurement["samples"]
    assert energy["j_per_inference"] == pytest.approx(expected, rel=0.01)


def test_throttling_marks_the_session(tmp_path, monkeypatch):
    root = plant(tmp_path / "root", {**CALM, COOLING + "0/cur_state": "1"})
    monkeypatch.setattr(edgecl.onboard.bench, "ThrottleWatch", functools.partial(ThrottleWatch, root=root))
    runs = []

    run_once = OrtSession.run_once

    def counting(self, mode="inference"):
        if not runs:
            (root / (OC + "oc2_event_cnt")).write_text("4")  # over-current, while it runs
        runs.append(1)
        return run_once(self, mode)

    monkeypatch.setattr(OrtSession, "run_once", counting)
    record = bench(make_bundle(tmp_path / "b"), duration_s=0.05, threads=1, power=False)
    assert runs
    assert record["marks"][:2] == [
        "throttled: oc2 (average over-current) counted 4",
        "throttled: cooling device cpu-throttle-alert (cooling_device0) at state 1",
    ]


def test_conditions_that_cast_doubt_are_marked():
    device = {"load_1m": 4.9, "cores": 2, "versions": {"tensorrt": "8.5.2"}}
    manifest = {"runtime": "tensorrt", "target": {"versions": ">=10.3,<10.8"}}
    assert _marks_of_conditions(device, manifest, "tensorrt", 3) == [
        "busy: a load of 4.9 on 2 cores before the run",
        "3 threads on 2 cores",
        "tensorrt 8.5.2, and the target is for >=10.3,<10.8",
    ]
    fine = {"load_1m": 0.5, "cores": 2, "versions": {"tensorrt": "10.3.0.26"}}
    assert _marks_of_conditions(fine, manifest, "tensorrt", 2) == []
    # Measured is measured: a vendor's suffix must not lose a record.
    odd = {**fine, "versions": {"tensorrt": "10.3.0rc1+jp6"}}
    assert _marks_of_conditions(odd, manifest, "tensorrt", 2) == []


class Scripted:
    """A session whose seconds come from a list, as a GPU's events would tell them."""

    closed = 0

    def __init__(self, seconds):
        self.seconds, self.runs = seconds, 0

    def bind(self, images):
        self.bound = images

    def modes(self):
        return ["compute"]

    def run_once(self, mode):
        self.runs += 1
        return self.seconds(self.runs)

    def describe(self):
        about = {"runtime": "scripted 1.0", "versions": {"scripted": "1.0"}, "settings": {}}
        return {**about, "engine": {"sha256": "e"}}

    def close(self):
        Scripted.closed += 1


def test_a_net_that_never_settles_and_slows_down_is_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(
        edgecl.onboard.bench, "open_session", lambda *_, **__: Scripted(lambda n: 0.001 * 1.0001**n)
    )
    monkeypatch.setattr(clock, "STEADY", 0.0)
    monkeypatch.setattr(clock, "LONGEST_S", 0.5)
    monkeypatch.setattr(
        edgecl.onboard.bench,
        "measure_interleaved",
        lambda tasks, **settings: clock.measure_interleaved(
            tasks, **{**settings, "max_warmup_s": 0.1, "min_samples": 4000}
        ),
    )
    closed = Scripted.closed
    record = bench(make_bundle(tmp_path / "b"), duration_s=0.05, threads=1, power=False)
    measurement = record["measurements"][0]
    assert measurement["steady"] is False
    assert measurement["drift"] > 1.03
    assert measurement["marks"] == ["unsteady", "noisy", "drift"]
    assert measurement["engine"] == {"sha256": "e"}
    assert Scripted.closed == closed + 1


def test_ratio_is_how_many_times_as_fast_the_lower_precision_is(tmp_path, monkeypatch):
    seconds = {"fp32": 0.004, "int8": 0.001}
    monkeypatch.setattr(
        edgecl.onboard.bench,
        "open_session",
        lambda *_, precision, **__: Scripted(lambda n: seconds[precision]),
    )
    bundle = make_bundle(tmp_path / "b", precisions=("int8", "fp32"))
    record = bench(bundle, precisions=["int8", "fp32"], duration_s=0.5, threads=1, power=False)
    (ratio,) = record["ratios"]
    del ratio["rounds"]
    assert ratio == {"a": "fp32", "b": "int8", "mode": "compute", "p50_ratio": 4.0, "ci95": [4.0, 4.0]}
    assert [one["latency_ms"]["p50"] for one in record["measurements"]] == [1.0, 4.0]


def test_a_session_is_closed_when_the_next_cannot_be_opened(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(OrtSession, "close", lambda self: closed.append(self._precision))
    bundle = make_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    manifest = read_manifest(bundle)
    manifest["precisions"]["fp16"]["model"] = "reference.npz"
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match=r"'reference\.npz' is no \*\.onnx file"):
        bench(bundle, precisions=["fp32", "fp16"], duration_s=0.05, threads=1, power=False)
    assert closed == ["fp32"]


def test_every_mode_of_tensorrt_is_measured_and_compared(tmp_path, monkeypatch):
    install(monkeypatch, "10.3.0")
    bundle = make_engine_bundle(tmp_path / "b")
    lines = []
    record = bench(bundle, precisions=["fp32", "fp16"], duration_s=0.05, power=False, report=lines.append)
    assert record["runtime"] == "tensorrt 10.3.0"
    assert record["device"]["tensorrt"] == "10.3.0"
    found = [(one["mode"], one["precision"], one["headline"]) for one in record["measurements"]]
    assert found == [(mode, name, mode == MODES[0]) for mode in MODES for name in ("fp32", "fp16")]
    assert [(one["a"], one["b"], one["mode"]) for one in record["ratios"]] == [
        ("fp32", "fp16", mode) for mode in MODES
    ]
    for one in record["measurements"]:
        assert len(one["engine"]["sha256"]) == 64
    assert any("building" in line for line in lines)


@pytest.fixture
def trtexec_bundle(tmp_path, monkeypatch):
    """A bundle for TensorRT on a machine with a trtexec whose queries take 2 ms and a little."""
    monkeypatch.setenv("TRTEXEC", str(make_trtexec(tmp_path / "bin", "10.3.0")))
    return make_engine_bundle(tmp_path / "b")


def test_trtexec_measures_every_mode_of_every_precision(trtexec_bundle):
    record = bench(
        trtexec_bundle, precisions=["fp16", "int8"], runtime="trtexec", duration_s=1.0, threads=2, power=False
    )
    json.dumps(record, allow_nan=False)
    assert record["runtime"] == "trtexec 10.3.0"
    assert record["device"]["tensorrt"] == "10.3.0"
    found = [(one["precision"], one["mode"], one["headline"]) for one in record["measurements"]]
    assert found == [(name, mode, mode == MODES[0]) for name in ("fp16", "int8") for mode in MODES]
    assert record["ratios"] == []
    headline = record["measurements"][0]
    assert 2.0 <= headline["latency_ms"]["p50"] <= 2.01
    assert headline["latency_ms"]["ci95_p50"][0] <= headline["latency_ms"]["p50"]
    assert headline["samples"] > 1
    assert headline["steady"] is headline["warmup_s"] is None
    assert headline["command"].startswith("trtexec --loadEngine=")
    assert "--useCudaGraph" in headline["command"]
    assert len(headline["engine"]["sha256"]) == 64


def test_a_batch_is_filled_with_the_reference_images(tmp_path, monkeypatch):
    bound = []
    bind = OrtSession.bind
    monkeypatch.setattr(OrtSession, "bind", lambda self, images: (bound.append(images), bind(self, images)))
    bundle = make_bundle(tmp_path / "b", batch=8, images=3)
    record = bench(bundle, duration_s=0.05, threads=1, power=False)
    assert record["batch"] == 8
    latency = record["measurements"][0]["latency_ms"]
    assert record["measurements"][0]["throughput_per_s"] == pytest.approx(8e3 / latency["mean"], rel=0.01)
    with np.load(bundle / "reference.npz") as arrays:
        np.testing.assert_array_equal(bound[0], arrays["inputs"][[0, 1, 2, 0, 1, 2, 0, 1]])


@pytest.mark.parametrize(
    ("program", "words"), [("onboard.pyz", "onboard.pyz"), ("/x/onboard/__main__.py", "-m edgecl.onboard")]
)
def test_the_whole_command_is_in_the_record(tmp_path, monkeypatch, program, words):
    monkeypatch.setattr(sys, "argv", [program, "bench", "a bundle", "--threads", "1"])
    record = bench(make_bundle(tmp_path / "b"), duration_s=0.05, threads=1, power=False)
    assert record["command"] == f"{Path(sys.executable).name} {words} bench 'a bundle' --threads 1"
