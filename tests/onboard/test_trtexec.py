"""trtexec: its logs, and runs of a program that takes one version's flags."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from edgecl.onboard import trtexec
from edgecl.onboard.errors import BundleError, DeviceError
from edgecl.onboard.trtexec_flags import MODES

from .fake_trtexec import FLAGS, make_trtexec
from .trtexec_bundle import bench, calls, lines, manifest_of, write_bundle

RECORDED = Path(__file__).parent / "recorded"


# --- logs ---


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8201] # trtexec", "8.2.1"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101602] [b10]", "10.16.2"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v11.1.0.106] [b48]", "11.1.0"),
        # As they were published.
        ("TensorRT.trtexec [TensorRT v110100] [b106]", "11.1.0"),
        ("[03/28/2024-07:10:12] [I] TensorRT version: 8.6.3", "8.6.3"),
        ("trtexec: command not found", None),
    ],
)
def test_version_of_a_banner(text, version):
    assert trtexec.version_of_banner(text) == version


@pytest.mark.parametrize(
    ("version", "per_s", "seconds"),
    [("8.2", 36.9018, 60.0512), ("10.3", 969.58, 3.00233), ("11.1", 2566.72, 3.0007)],
)
def test_a_log_tells_throughput_and_duration(version, per_s, seconds):
    log = (RECORDED / f"trtexec-{version}.txt").read_text()
    assert trtexec.number_in(log, "Throughput: ", " qps") == per_s
    assert trtexec.number_in(log, r"Timing trace has \d+ queries over ", " s") == seconds


def test_throughput_with_an_exponent():
    assert trtexec.number_in("[I] Throughput: 1.29477e+08 qps", "Throughput: ", " qps") == 1.29477e8


def test_times_of_the_older_versions_have_no_enqueue(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('[{"startInMs": 1, "inMs": 0, "computeMs": 2.5, "latencyMs": 2.75, "endToEndMs": 3}]')
    times = trtexec.read_times(path)
    assert {name: list(values) for name, values in times.items()} == {"compute": [2.5], "latency": [2.75]}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[1]", '[{"computeMs": 1}]', '[{"computeMs": NaN, "latencyMs": 1}]', '[{"computeMs":'],
)
def test_a_file_without_times_is_an_error(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DeviceError, match="trtexec reported no times"):
        trtexec.read_times(tmp_path / "t.json")


def times_of(compute_ms, enqueue_ms):
    count = len(compute_ms)
    return {
        "compute": np.array(compute_ms),
        "latency": np.array(compute_ms),
        "enqueue": np.full(count, enqueue_ms),
    }


@pytest.mark.parametrize(
    ("compute_ms", "enqueue_ms", "marks"),
    [
        ([1.0] * 50 + [1.04] * 50, 0.1, []),  # 1.96 %
        ([1.0] * 50 + [1.06] * 50, 0.1, ["unstable"]),  # 2.9 %
        ([1.0] * 9, 0.79, []),
        ([1.0] * 9, 0.81, ["enqueue bound"]),
    ],
)
def test_marks_follow_the_thresholds(compute_ms, enqueue_ms, marks):
    assert trtexec.marks_of("", times_of(compute_ms, enqueue_ms)) == marks


# --- running it ---


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path)


@pytest.fixture
def install(tmp_path, monkeypatch):
    def install(version, **options):
        program = make_trtexec(tmp_path / "bin", version, **options)
        monkeypatch.setenv("TRTEXEC", str(program))
        return program

    return install


def measure(bundle, manifest=None, *, precision="fp16", report=lambda line: None):
    return trtexec.measure_with_trtexec(
        bundle, manifest or manifest_of(), precision=precision, duration_s=1.0, report=report
    )


@pytest.mark.parametrize("version", ["8.2.1", "8.6.2", "10.3.0", "11.1.0"])
def test_each_mode_is_measured_from_the_exported_times(bundle, install, version):
    install(version)
    said, before = [], sorted(bundle.iterdir())
    describe, modes = measure(bundle, manifest_of(versions=""), report=said.append)
    medians_ms = {mode: 1e3 * np.median(about["samples_s"]) for mode, about in modes.items()}
    # Without a graph 0.5 more, transfers 0.375.
    assert medians_ms == pytest.approx(dict(zip(MODES, (2.005, 2.505, 2.38, 2.88), strict=True)))
    assert {len(about["samples_s"]) for about in modes.values()} == {1024}
    assert [about["marks"] for about in modes.values()] == [[], ["enqueue bound"]] * 2
    assert modes[MODES[0]]["enqueue_p50_ms"] == pytest.approx(0.01, abs=1e-5)
    assert modes[MODES[0]]["throughput_per_s"] == 500.5
    assert describe["runtime"] == "trtexec " + version
    assert describe["engine"]["layers"] == {"fp16": 2, "fp32": 1}
    assert describe["engine"]["build_s"] > 0
    timings = [f"fp16, {mode}: timing with trtexec" for mode in MODES]
    assert said == ["fp16: building an engine with trtexec", *timings]
    assert sorted(bundle.iterdir()) == before


def test_the_recorded_commands_hold_no_path_of_this_machine(tmp_path, bundle, install):
    install("10.3.0")
    describe, modes = measure(bundle)
    assert describe["settings"]["build"] == shlex.join(lines("10.3")["build"]).replace(
        "e.plan", "engine.plan"
    )
    expected = shlex.join(bench("10.3", MODES[0])).replace("--duration=60", "--duration=1")
    for short, whole in (("e.plan", "engine.plan"), ("t.json", "times.json"), ("l.json", "layers.json")):
        expected = expected.replace("=" + short, "=" + whole)
    assert modes[MODES[0]]["command"] == expected
    assert str(tmp_path) not in json.dumps([describe, [{**one, "samples_s": 0} for one in modes.values()]])


def test_the_window_of_the_timed_runs_lies_within_the_run(bundle, install):
    install("10.3.0")
    first, second, *_ = measure(bundle)[1].values()
    assert first["duration_s"] >= 0.05
    assert first["window"][1] - first["window"][0] == pytest.approx(first["duration_s"])
    assert first["window"][1] <= second["window"][0]


@pytest.mark.parametrize(
    ("precision", "fault", "seen"), [("fp16", "only float", "fp32"), ("int8", "only half", "fp16")]
)
def test_an_engine_in_another_precision_is_refused(bundle, install, precision, fault, seen):
    program = install("10.3.0", fault=fault)
    with pytest.raises(DeviceError, match=rf"{precision} and not delivered: .*\({seen} 100 %\)"):
        measure(bundle, precision=precision)
    assert len(calls(program)) == 3  # in the first mode: the others are not run


def test_int8_is_held_to_the_nodes_that_are_not_left_wider(bundle, install):
    manifest, program = manifest_of(), install("10.3.0")
    text = program.read_text()
    program.write_text(text.replace("layers = [layer(kind),", 'layers = 7 * [layer("Half")] + [layer(kind),'))
    assert program.read_text() != text  # now 2 of 10 are int8
    with pytest.raises(DeviceError, match=r"computes 20 % of .* asks for 100 % \("):
        measure(bundle, manifest, precision="int8")
    manifest["precisions"]["int8"]["decision"] = {"kept_nodes": ["a", "b"], "candidates": 4}
    measure(bundle, manifest, precision="int8")


def test_fp32_is_what_any_engine_delivers(bundle, install):
    install("10.3.0")
    describe, modes = measure(bundle, precision="fp32")
    assert describe["engine"]["precision_checked"] is True
    assert describe["engine"]["layers"] == {"fp32": 3}
    assert modes[MODES[0]]["marks"] == []


@pytest.mark.parametrize(("fault", "layers"), [("only names", {"unknown": 2}), ("no layers", None)])
def test_layers_that_do_not_tell_their_precision_are_marked(bundle, install, fault, layers):
    install("10.3.0", fault=fault)
    said = []
    describe, modes = measure(bundle, report=said.append)
    assert describe["engine"]["precision_checked"] is False
    assert describe["engine"]["layers"] == layers
    assert all(about["marks"][-1] == "precision not checked" for about in modes.values())
    assert said[-1] == "fp16: the engine does not tell the precision of its layers"


def test_another_precision_takes_its_own_file(bundle, install):
    program = install("10.3.0")
    measure(bundle, precision="int8")
    assert "--onnx=%s" % (bundle / "model.int8.onnx") in calls(program)[1]
    with pytest.raises(BundleError, match="the bundle holds no bf16 net"):
        measure(bundle, precision="bf16")


def test_unstable_times_a_lost_graph_and_a_foreign_version_are_marked(bundle, install):
    install("11.1.0", fault="capture", compute_ms=(1.0, 1.0, 1.2))
    marks = measure(bundle)[1][MODES[0]]["marks"]
    assert marks == ["outside the target's versions", "unstable", "no CUDA graph"]


@pytest.mark.parametrize(
    ("version", "fault", "problem"),
    [
        (
            "8.5.2",
            "parse",
            # trtexec's own lines, all of them.
            "exit status 1: Parsing model failed; Failed to create engine from model or file.; Engine set up failed",
        ),
        ("8.2.1", "killed", "killed by SIGKILL"),
        ("10.3.0", "no times", "no times"),
    ],
)
def test_a_run_that_fails_says_trtexecs_own_words(bundle, install, version, fault, problem):
    install(version, fault=fault)
    with pytest.raises(DeviceError) as caught:
        measure(bundle, manifest_of(versions=""))
    assert caught.value.problem.endswith(problem)
    assert "trtexec.sh" in caught.value.hint or "'build.workspace_mib'" in caught.value.hint


def test_a_flag_that_the_version_lacks_is_named(bundle, install, monkeypatch):
    monkeypatch.setitem(FLAGS, "10.3.0", FLAGS["10.3.0"].replace("profilingVerbosity", ""))
    install("10.3.0")
    with pytest.raises(DeviceError, match=r"10\.3\.0 does not know --profilingVerbosity\b"):
        measure(bundle)


def test_a_run_that_hangs_is_ended(bundle, install, monkeypatch):
    monkeypatch.setattr(trtexec, "RUN_LIMIT_S", -0.5)
    install("10.3.0", fault="hang")
    with pytest.raises(DeviceError, match=r"did not end within 0\.5 s"):
        measure(bundle)


# --- finding it ---


@pytest.fixture
def bare(monkeypatch, tmp_path):
    monkeypatch.delenv("TRTEXEC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.mark.usefixtures("bare")
def test_trtexec_is_found_where_jetpack_puts_it_by_its_variable_and_on_the_path(tmp_path, monkeypatch):
    with pytest.raises(DeviceError, match=r"no trtexec on this device") as caught:
        trtexec.find_trtexec(tmp_path)
    assert "/usr/src/tensorrt/bin/trtexec" in caught.value.hint
    assert "libnvinfer-bin" in caught.value.hint
    program = make_trtexec(tmp_path / "usr/src/tensorrt/bin", "8.5.2")
    assert trtexec.find_trtexec(tmp_path) == str(program)
    assert trtexec.trtexec_version(str(program)) == "8.5.2"
    monkeypatch.setenv("PATH", str(program.parent))
    assert trtexec.find_trtexec() == str(program)
    monkeypatch.setenv("TRTEXEC", str(program))
    assert trtexec.find_trtexec(tmp_path / "elsewhere") == str(program)
    monkeypatch.setenv("TRTEXEC", "/no/such/trtexec")
    with pytest.raises(DeviceError, match=r"TRTEXEC is '/no/such/trtexec'.* no program"):
        trtexec.find_trtexec()


def test_a_program_that_is_no_trtexec_is_named(tmp_path):
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho usage: other FILE\n")
    other.chmod(0o755)
    with pytest.raises(DeviceError, match=rf"'{other}' .*version, but: usage: other FILE"):
        trtexec.trtexec_version(str(other))
    with pytest.raises(DeviceError, match=rf"^'{tmp_path}' cannot be started"):
        trtexec.trtexec_version(str(tmp_path))
