"""trtexec: its logs, and runs of a program that takes one version's flags."""

import hashlib
import json
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgecl.onboard import trtexec
from edgecl.onboard.errors import BundleError, DeviceError
from edgecl.onboard.trtexec_flags import MODES

from .fake_trtexec import FLAGS, QUERY, make_trtexec
from .trtexec_bundle import bench, calls, lines, manifest_of, write_bundle

RECORDED = Path(__file__).parent / "recorded"


# --- logs ---


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8201] # trtexec", "8.2.1"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8601]", "8.6.1"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100001] # ./trtexec", "10.0.1"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] [b26] #", "10.3.0"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101602] [b10]", "10.16.2"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v110100] [b106]", "11.1.0"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v11.1.0.106] [b48]", "11.1.0"),
        ("[11/20/2026-10:00:01] [I] TensorRT version: 8.2.1", "8.2.1"),
        ("trtexec: command not found", None),
    ],
)
def test_version_of_a_banner(text, version):
    assert trtexec.version_of_banner(text) == version


def test_summary_of_8_2_with_one_percentile():
    log = (RECORDED / "trtexec-8.2.txt").read_text()
    summary = trtexec.read_summary(log)
    assert summary["GPU Compute Time"] == {
        "min": 26.7461,
        "max": 28.9746,
        "mean": 27.0132,
        "median": 27.0029,
        "p99": 27.4805,
    }
    assert summary["Latency"]["median"] == 27.1309
    assert summary["End-to-End Host Latency"]["median"] == 27.1419
    assert summary["Throughput"] == {"qps": 36.9018}
    assert "coefficient of variance" not in summary
    assert trtexec.marks_of(log, summary, None) == ["summary only"]


def test_summary_of_10_3_with_its_warnings():
    log = (RECORDED / "trtexec-10.3.txt").read_text()
    summary = trtexec.read_summary(log)
    assert summary["GPU Compute Time"]["p90"] == 1.05615
    assert summary["GPU Compute Time"]["p50"] == summary["GPU Compute Time"]["median"] == 0.958008
    assert summary["coefficient of variance"] == {"percent": 6.1}
    assert trtexec.marks_of(log, summary, None) == [
        "summary only",
        "unstable",
        "enqueue bound",
    ]


def test_summary_of_11_1_whose_warning_lies_under_our_threshold():
    log = (RECORDED / "trtexec-11.1.txt").read_text()
    summary = trtexec.read_summary(log)
    assert summary["Enqueue Time"]["min"] == 0.00463867
    assert summary["coefficient of variance"] == {"percent": 1.92523}
    assert trtexec.marks_of(log, summary, None) == ["summary only"]


# Lines that trtexec printed on other people's machines, as they published them.
PUBLISHED = {
    # OE4T/meta-tegra, pull request 952: AGX Xavier.
    "v8400": (
        "[03/11/2022-14:57:03] [I] GPU Compute Time: min = 0.375977 ms, max = 0.403564 ms, mean = 0.388221 ms, "
        "median = 0.388443 ms, percentile(99%) = 0.393188 ms",
        {"min": 0.375977, "max": 0.403564, "mean": 0.388221, "median": 0.388443, "p99": 0.393188},
    ),
    # NVIDIA/TensorRT, issue 4177, of the time of 10.x.
    "10.x": (
        "[10/03/2024-10:47:59] [I] GPU Compute Time: min = 5.34595 ms, max = 13.3388 ms, mean = 7.58404 ms, median = "
        "7.14139 ms, percentile(90%) = 10.2881 ms, percentile(95%) = 10.8175 ms, percentile(99%) = 12.9485 ms",
        {
            "min": 5.34595,
            "max": 13.3388,
            "mean": 7.58404,
            "median": 7.14139,
            "p90": 10.2881,
            "p95": 10.8175,
            "p99": 12.9485,
        },
    ),
}


@pytest.mark.parametrize("version", PUBLISHED)
def test_published_lines_are_read_to_the_last_digit(version):
    line, expected = PUBLISHED[version]
    assert trtexec.read_summary(line)["GPU Compute Time"] == expected


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        (
            "&&&& PASSED TensorRT.trtexec [TensorRT v8400] # trtexec --loadEngine=mnist16.trt --batch=16",
            "8.4.0",
        ),
        (
            "&&&& RUNNING TensorRT.trtexec [TensorRT v100200] # trtexec.exe --loadEngine=FM_P_D_fp16.engine",
            "10.2.0",
        ),
        ("TensorRT.trtexec [TensorRT v110000] [b114]", "11.0.0"),
        ("TensorRT.trtexec [TensorRT v110100] [b106]", "11.1.0"),
        ("[03/28/2024-07:10:12] [I] TensorRT version: 8.6.3", "8.6.3"),
    ],
)
def test_published_banners_give_the_version(banner, version):
    assert trtexec.version_of_banner(banner) == version


def test_throughput_with_an_exponent():
    assert trtexec.read_summary("[I] Throughput: 1.29477e+08 qps")["Throughput"] == {"qps": 1.29477e8}


def test_times_of_the_older_versions_have_no_enqueue(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('[{"startInMs": 1, "inMs": 0, "computeMs": 2.5, "latencyMs": 2.75, "endToEndMs": 3}]')
    times = trtexec.read_times(path)
    assert {name: list(values) for name, values in times.items()} == {"compute": [2.5], "latency": [2.75]}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[1]", '[{"computeMs": 1}]', '[{"computeMs": NaN, "latencyMs": 1}]', '[{"computeMs":'],
)
def test_a_file_without_times_is_none(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    assert trtexec.read_times(tmp_path / "t.json") is None
    assert trtexec.read_times(tmp_path / "absent.json") is None


def test_exported_times_have_the_keys_that_are_read():
    assert {"computeMs", "latencyMs", "startEnqMs", "endEnqMs"} <= set(QUERY)


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
    assert trtexec.marks_of("", {}, times_of(compute_ms, enqueue_ms)) == marks


# --- running it ---


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path)


def measure(bundle, program, manifest=None, **settings):
    return trtexec.measure_with_trtexec(
        bundle, manifest or manifest_of(), trtexec=str(program), duration_s=1.0, root=bundle, **settings
    )


@pytest.mark.parametrize("version", ["8.2.1", "8.6.2", "10.3.0", "11.1.0"])
def test_each_mode_is_measured_from_the_exported_times(tmp_path, bundle, version):
    program = make_trtexec(tmp_path / "bin", version)
    said = []
    record = measure(bundle, program, manifest_of(versions=""), report=said.append)
    assert list(record["modes"]) == list(MODES)
    median_ms = {mode: 1e3 * np.median(about["samples_s"]) for mode, about in record["modes"].items()}
    expected = {
        MODES[0]: 2.005,
        MODES[1]: 2.505,
        MODES[2]: 2.38,
        MODES[3]: 2.88,
    }  # graph off +0.5, transfers +0.375
    assert median_ms == pytest.approx(expected)
    assert {len(about["samples_s"]) for about in record["modes"].values()} == {1024}
    assert [about["marks"] for about in record["modes"].values()] == [
        [],
        ["enqueue bound"],
        [],
        ["enqueue bound"],
    ]
    assert record["modes"][MODES[0]]["enqueue_p50_ms"] == pytest.approx(0.01, abs=1e-5)
    assert record["modes"][MODES[0]]["throughput_per_s"] == 500.5
    describe = record["describe"]
    assert describe["runtime"] == "trtexec " + version
    assert describe["precision"] == "fp16"
    assert describe["engine"]["layers"] == {"fp16": 2, "fp32": 1}
    plan = bundle / describe["engine"]["file"]
    assert describe["engine"]["sha256"] == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert said == [
        "fp16: building an engine with trtexec",
        *(f"fp16, {m}: timing with trtexec" for m in MODES),
    ]


def test_the_recorded_commands_hold_no_path_of_this_machine(tmp_path, bundle):
    record = measure(bundle, make_trtexec(tmp_path / "bin", "10.3.0"), modes=MODES[:1])
    plan = record["describe"]["engine"]["file"]
    settings, mode = record["describe"]["settings"], record["modes"][MODES[0]]
    assert settings["build"] == shlex.join(lines("10.3")["build"]).replace("e.plan", "engine.plan")
    expected = shlex.join(bench("10.3", MODES[0])).replace("e.plan", plan).replace("t.json", "times.json")
    assert (
        mode["command"]
        == expected.replace("--duration=60", "--duration=1") + " --exportLayerInfo=layers.json"
    )
    assert str(tmp_path) not in json.dumps({**record, "modes": {**mode, "samples_s": None}})


def test_the_window_of_the_timed_runs_lies_within_the_run(tmp_path, bundle):
    record = measure(bundle, make_trtexec(tmp_path / "bin", "10.3.0"), modes=MODES[:2])
    first, second = (about["window"] for about in record["modes"].values())
    duration_s = record["modes"][MODES[0]]["duration_s"]
    assert duration_s >= 0.05
    assert first[1] - first[0] == pytest.approx(duration_s)
    assert first[1] <= second[0]


def test_an_engine_is_built_once_for_a_model_version_and_device(tmp_path, bundle):
    program = make_trtexec(tmp_path / "bin", "10.3.0")

    def builds():
        return Counter(any(word.startswith("--onnx=") for word in call) for call in calls(program))[True]

    first = measure(bundle, program, modes=MODES[:1])["describe"]["engine"]
    assert first["build_s"] > 0
    again = measure(bundle, program, modes=MODES[:1])["describe"]["engine"]
    assert (again["file"], again["build_s"], builds()) == (first["file"], None, 1)
    measure(bundle, program, manifest_of(workspace_mib=64), modes=MODES[:1])
    assert builds() == 2
    (bundle / "model.fp16.onnx").write_bytes(b"another net")
    measure(bundle, program, modes=MODES[:1])
    assert builds() == 3
    board = bundle / "proc/device-tree/model"  # root is the bundle here
    board.parent.mkdir(parents=True)
    board.write_bytes(b"NVIDIA Jetson Orin Nano\0")
    measure(bundle, program, modes=MODES[:1])
    assert builds() == 4


def test_an_engine_that_no_longer_loads_is_built_again(tmp_path, bundle):
    program = make_trtexec(tmp_path / "bin", "10.3.0")
    plan = bundle / measure(bundle, program, modes=MODES[:1])["describe"]["engine"]["file"]
    plan.write_bytes(b"of another driver")
    plan.with_suffix(".json").write_text(
        json.dumps({"sha256": hashlib.sha256(plan.read_bytes()).hexdigest()})
    )
    record = measure(bundle, program, modes=MODES[:1])
    assert plan.read_bytes() == b"plan of 10.3.0 in Half"
    assert record["describe"]["engine"]["build_s"] > 0
    assert len([call for call in calls(program) if call[0].startswith("--loadEngine")]) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("plan", "the file changed since it was built"),
        ("no record", "its record is missing or damaged"),
        ("torn record", "its record is missing or damaged"),
    ],
)
def test_a_kept_engine_that_changed_is_built_again(tmp_path, bundle, change, words):
    program = make_trtexec(tmp_path / "bin", "10.3.0")
    engine = measure(bundle, program, modes=MODES[:1])["describe"]["engine"]
    plan = bundle / engine["file"]
    record = plan.with_suffix(".json")
    assert json.loads(record.read_text())["sha256"] == engine["sha256"]
    if change == "plan":
        content = bytearray(plan.read_bytes())
        content[-1] ^= 1  # where trtexec itself does not see it
        plan.write_bytes(bytes(content))
    elif change == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text()[:-9])
    said = []
    again = measure(bundle, program, modes=MODES[:1], report=said.append)["describe"]["engine"]
    assert said[0] == f"building '{plan.name}' again: {words}"
    assert again["build_s"] > 0
    assert again["sha256"] == engine["sha256"] == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert json.loads(record.read_text())["sha256"] == engine["sha256"]


@pytest.mark.parametrize(
    ("precision", "fault", "seen"),
    [
        ("fp16", "only float", "fp32 100 %"),
        ("int8", "only float", "fp32 100 %"),
        ("int8", "only half", "fp16 100 %"),
    ],
)
@pytest.mark.parametrize("kept", [False, True], ids=["built", "kept"])
def test_an_engine_in_another_precision_is_refused_and_deleted(
    tmp_path, bundle, precision, fault, seen, kept
):
    before = sorted(path.name for path in bundle.iterdir())
    if kept:  # by an edgecl that did not look
        measure(bundle, make_trtexec(tmp_path / "bin", "10.3.0"), precision=precision, modes=MODES[:1])
    program = make_trtexec(tmp_path / "bin", "10.3.0", fault=fault)
    with pytest.raises(DeviceError) as caught:
        measure(bundle, program, precision=precision)
    assert caught.value.problem == (
        f"asked for {precision} and not delivered: trtexec 10.3.0 computes 0 % of the convolutions and matrix "
        f"products in it, the graph asks for 100 % ({seen})"
    )
    assert sorted(path.name for path in bundle.iterdir()) == before
    assert calls(program)[-1][0].startswith("--loadEngine")  # in the first mode: the others are not run
    assert len(calls(program)) == (5 if kept else 3)


def test_int8_is_held_to_the_nodes_that_are_not_left_wider(tmp_path, bundle):
    manifest = manifest_of()
    program = make_trtexec(tmp_path / "bin", "10.3.0")
    text = program.read_text()
    program.write_text(text.replace("layers = [layer(kind),", 'layers = 5 * [layer("Half")] + [layer(kind),'))
    assert program.read_text() != text  # now 2 of 8 are int8
    measure(bundle, program, manifest, precision="int8", modes=MODES[:1])
    program.write_text(text.replace("layers = [layer(kind),", 'layers = 7 * [layer("Half")] + [layer(kind),'))
    with pytest.raises(DeviceError, match=r"computes 20 % of .* asks for 100 % \("):
        measure(bundle, program, manifest, precision="int8", modes=MODES[:1])
    manifest["precisions"]["int8"]["decision"] = {"kept_nodes": ["a", "b"], "candidates": 4}
    measure(bundle, program, manifest, precision="int8", modes=MODES[:1])


def test_fp32_is_what_any_engine_delivers(tmp_path, bundle):
    record = measure(bundle, make_trtexec(tmp_path / "bin", "10.3.0"), precision="fp32", modes=MODES[:1])
    assert record["describe"]["engine"]["precision_checked"] is True
    assert record["describe"]["engine"]["layers"] == {"fp32": 3}
    assert record["modes"][MODES[0]]["marks"] == []


@pytest.mark.parametrize(("fault", "layers"), [("only names", {"unknown": 2}), ("no layers", None)])
def test_layers_that_do_not_tell_their_precision_are_marked(tmp_path, bundle, fault, layers):
    program = make_trtexec(tmp_path / "bin", "10.3.0", fault=fault)
    said = []
    record = measure(bundle, program, modes=(MODES[0], MODES[2]), report=said.append)
    assert record["describe"]["engine"]["precision_checked"] is False
    assert record["describe"]["engine"]["layers"] == layers
    assert [about["marks"] for about in record["modes"].values()] == [["precision not checked"]] * 2
    assert said[-1] == "fp16: the engine does not tell the precision of its layers"


def test_another_precision_takes_its_own_file(tmp_path, bundle):
    program = make_trtexec(tmp_path / "bin", "10.3.0")
    assert measure(bundle, program, precision="int8", modes=MODES[:1])["describe"]["precision"] == "int8"
    assert "--onnx=%s" % (bundle / "model.int8.onnx") in calls(program)[1]
    with pytest.raises(BundleError, match="the bundle holds no bf16 net"):
        measure(bundle, program, precision="bf16")


@pytest.mark.parametrize("fault", ["no times", "torn times"])
def test_without_exported_times_the_summary_is_read_and_marked(tmp_path, bundle, fault):
    record = measure(
        bundle, make_trtexec(tmp_path / "bin", "10.3.0", fault=fault), modes=(MODES[0], MODES[3])
    )
    compute, transfers = record["modes"].values()
    assert compute["samples_s"] is None
    assert compute["marks"] == ["summary only"]
    assert compute["latency_ms"] == {"p50": 2.0, "p90": 2.25, "p99": 2.5, "mean": 2.5, "min": 1.5, "max": 3.5}
    assert transfers["latency_ms"]["p50"] == 2.5  # of Latency, not of GPU Compute Time
    assert compute["enqueue_p50_ms"] == 0.6


def test_unstable_times_a_lost_graph_and_a_foreign_version_are_marked(tmp_path, bundle):
    program = make_trtexec(tmp_path / "bin", "11.1.0", fault="capture", compute_ms=(1.0, 1.0, 1.2))
    (about,) = measure(bundle, program, modes=MODES[:1])["modes"].values()
    assert about["marks"] == ["outside the target's versions", "unstable", "no CUDA graph"]


def test_a_build_that_fails_says_trtexecs_own_words_and_leaves_nothing(tmp_path, bundle):
    before = sorted(path.name for path in bundle.iterdir())
    with pytest.raises(DeviceError) as caught:
        measure(bundle, make_trtexec(tmp_path / "bin", "8.5.2", fault="parse"), manifest_of(versions=""))
    assert caught.value.problem == (
        "trtexec failed with exit status 1: Parsing model failed; Failed to create engine from model or file.; "
        "Engine set up failed"
    )
    assert caught.value.hint.startswith(f"run it by hand: {tmp_path}/bin/trtexec '--onnx=")
    assert sorted(path.name for path in bundle.iterdir()) == before


def test_a_flag_that_the_version_lacks_is_named(tmp_path, bundle, monkeypatch):
    monkeypatch.setitem(FLAGS, "10.3.0", [flag for flag in FLAGS["10.3.0"] if flag != "profilingVerbosity"])
    with pytest.raises(DeviceError, match=r"^trtexec 10\.3\.0 does not know --profilingVerbosity$"):
        measure(bundle, make_trtexec(tmp_path / "bin", "10.3.0"))


def test_a_build_killed_for_memory_says_so(tmp_path, bundle):
    with pytest.raises(DeviceError, match=r"^trtexec was killed by SIGKILL$") as caught:
        measure(bundle, make_trtexec(tmp_path / "bin", "8.2.1", fault="killed"), manifest_of(versions=""))
    assert "'build.workspace_mib'" in caught.value.hint


def test_a_run_that_hangs_is_ended(tmp_path, bundle, monkeypatch):
    monkeypatch.setattr(trtexec, "RUN_LIMIT_S", -0.5)
    with pytest.raises(DeviceError, match=r"^trtexec did not end within 0\.5 s$"):
        measure(bundle, make_trtexec(tmp_path / "bin", "10.3.0", fault="hang"))


def test_a_run_that_reports_nothing_is_an_error(tmp_path, bundle):
    program = make_trtexec(tmp_path / "bin", "10.3.0", fault="silent")
    program.write_text(program.read_text().replace("json.dumps(queries)", '"[]"'))
    with pytest.raises(DeviceError, match=r"^trtexec reported no times$"):
        measure(bundle, program)


# --- finding it ---


@pytest.fixture
def bare(monkeypatch, tmp_path):
    monkeypatch.delenv("TRTEXEC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.mark.usefixtures("bare")
def test_trtexec_is_found_where_jetpack_puts_it(tmp_path):
    program = make_trtexec(tmp_path / "usr/src/tensorrt/bin", "8.5.2")
    assert trtexec.find_trtexec(tmp_path) == str(program)
    assert trtexec.trtexec_version(str(program)) == "8.5.2"


@pytest.mark.usefixtures("bare")
def test_trtexec_is_found_by_its_variable_and_on_the_path(tmp_path, monkeypatch):
    program = make_trtexec(tmp_path / "bin", "10.3.0")
    monkeypatch.setenv("PATH", str(program.parent))
    assert trtexec.find_trtexec() == str(program)
    monkeypatch.setenv("TRTEXEC", str(program))
    assert trtexec.find_trtexec(tmp_path / "elsewhere") == str(program)
    monkeypatch.setenv("TRTEXEC", "/no/such/trtexec")
    with pytest.raises(DeviceError, match=r"^TRTEXEC is '/no/such/trtexec', which is no program$"):
        trtexec.find_trtexec()


@pytest.mark.usefixtures("bare")
def test_a_missing_trtexec_says_where_it_is_and_how_it_gets_there(tmp_path):
    with pytest.raises(DeviceError, match=r"^there is no trtexec on this device$") as caught:
        trtexec.find_trtexec(tmp_path)
    assert caught.value.hint.startswith(
        "on a Jetson it is /usr/src/tensorrt/bin/trtexec, from the package libnvinfer-bin "
        "(`sudo apt install libnvinfer-bin`)"
    )


def test_a_program_that_is_no_trtexec_is_named(tmp_path):
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho usage: other FILE\n")
    other.chmod(0o755)
    with pytest.raises(DeviceError, match=rf"^'{other}' does not say its version, but: usage: other FILE$"):
        trtexec.trtexec_version(str(other))
    with pytest.raises(DeviceError, match=rf"^'{tmp_path}' cannot be started"):
        trtexec.trtexec_version(str(tmp_path))
