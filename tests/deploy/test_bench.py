"""The host's `bench`: a real process that measures, and what becomes of one that fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import edgecl.deploy.bench
from edgecl.cli.bench import bench_command
from edgecl.deploy.bench import bench
from edgecl.errors import ArtifactError, DeviceError
from edgecl.onboard.bundle import bench_name, sha256_of_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from onboard.tiny_bundle import flip_byte, make_bundle


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A bundle, its record, and the lines told while measuring it for a moment in a real process."""
    bundle = make_bundle(tmp_path_factory.mktemp("bench") / "bundle")
    lines = []
    return bundle, bench(bundle, duration_s=0.2, threads=1, report=lines.append), lines


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


def test_record_begins_with_its_header_and_is_kept_under_the_devices_name(measured):
    bundle, record, _ = measured
    assert list(record)[:5] == ["schema", "kind", "made_by", "made_from", "command"]
    assert record["kind"] == "bench"
    assert record["made_from"] == sha256_of_file(bundle / "manifest.json")
    assert json.loads((bundle / bench_name(record["device"]["name"])).read_text()) == record


def test_record_holds_the_numbers_of_the_contract(measured):
    _, record, _ = measured
    latency = record["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
    assert latency["ci95_p50"][0] <= latency["p50"] <= latency["ci95_p50"][1]
    assert latency["mean"] > 0
    assert record["throughput_per_s"] == pytest.approx(1e3 / latency["mean"], rel=0.01)
    assert record["samples"] >= 1000
    assert record["warmup_samples"] >= 1
    assert isinstance(record["steady"], bool)
    assert record["duration_s"] >= 0.2
    assert record["precision"] == "fp32"
    assert record["batch"] == 1
    assert record["runtime"].startswith("onnxruntime ")


def test_record_holds_the_conditions(measured):
    _, record, _ = measured
    assert record["threads"] == record["device"]["threads"] == 1
    assert record["environment"]["OMP_NUM_THREADS"] == "1"
    assert record["settings"]["intra_op_num_threads"] == 1
    assert set(record["device"]) >= {
        "name",
        "cpu_model",
        "machine",
        "cores",
        "governor",
        "load_1m",
        "memory_mib",
        "os",
        "python",
        "versions",
    }


def test_progress_is_passed_on_without_its_mark(measured):
    _, _, lines = measured
    assert lines
    assert lines[0].startswith("warming up: ")


def test_measuring_process_imports_no_torch_and_nothing_else_of_edgecl(bundle):
    code = (
        "import sys; from edgecl.onboard.__main__ import main; main(sys.argv[1:]); "
        "names = [name for name in sys.modules if name.split('.')[0] in ('torch', 'edgecl')]; "
        "print([name for name in names if name != 'edgecl' and not name.startswith('edgecl.onboard')])"
    )
    command = [sys.executable, "-c", code, "bench", str(bundle), "--duration-s", "0.01", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["model.onnx", "reference.npz"])
def test_flipped_byte_stops_it_with_the_devices_own_text(bundle, name):
    flip_byte(bundle / name)
    with pytest.raises(ArtifactError, match=f"'{name}' does not match its hash: the manifest says") as caught:
        bench(bundle, duration_s=0.1)
    assert caught.value.hint == "the file changed after export; export the bundle again"
    assert not list(bundle.glob("bench-*"))


def test_a_directory_that_is_no_bundle_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="is not a bundle directory"):
        bench(tmp_path)


def test_relative_path_is_the_callers(bundle, monkeypatch):
    flip_byte(bundle / "model.onnx")
    monkeypatch.chdir(bundle.parent)
    with pytest.raises(ArtifactError, match="does not match its hash"):
        bench(Path("bundle"), duration_s=0.1)


def in_place_of_the_device_code(monkeypatch, code):
    monkeypatch.setattr(edgecl.deploy.bench, "_ONBOARD", [sys.executable, "-c", code])


def test_killed_process_is_reported_with_its_signal(bundle, monkeypatch):
    in_place_of_the_device_code(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(DeviceError, match=r"the measuring process was killed by SIGKILL \(9\)") as caught:
        bench(bundle)
    assert "memory ran out" in caught.value.hint
    assert not list(bundle.glob("bench-*"))


def test_crashed_process_is_reported_with_its_last_words(bundle, monkeypatch):
    in_place_of_the_device_code(monkeypatch, "raise SystemExit('the roof is on fire')")
    with pytest.raises(DeviceError, match="ended with exit status 1 and no record") as caught:
        bench(bundle)
    assert caught.value.where["it said"] == "the roof is on fire"


def test_process_with_half_an_answer_is_reported(bundle, monkeypatch):
    in_place_of_the_device_code(monkeypatch, "print('{\"latency_ms\": ')")
    with pytest.raises(DeviceError, match="ended with exit status 0 and no record"):
        bench(bundle)


def test_missing_runtime_is_a_device_error(bundle, monkeypatch):
    code = "import sys; sys.modules['onnxruntime'] = None; "
    code += "from edgecl.onboard.__main__ import main; sys.exit(main())"
    in_place_of_the_device_code(monkeypatch, code)
    with pytest.raises(DeviceError, match="the runtime 'onnxruntime' cannot be imported") as caught:
        bench(bundle)
    assert caught.value.hint == "pip install onnxruntime"


def run_command(monkeypatch, record, *arguments):
    asked = {}

    def fake(bundle, **settings):
        asked.update(settings, bundle=bundle)
        settings["report"]("measuring: 1 s")
        return record

    monkeypatch.setattr(edgecl.deploy.bench, "bench", fake)
    app = typer.Typer()
    app.command()(bench_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments]), asked


def test_command_prints_one_json_object_and_progress_apart(measured, monkeypatch):
    bundle, record, _ = measured
    done, asked = run_command(monkeypatch, record, bundle, "--duration-s", "3", "--threads", "2", "--json")
    assert json.loads(done.stdout) == record
    assert done.stderr == "measuring: 1 s\n"
    assert (asked["bundle"], asked["duration_s"], asked["threads"]) == (bundle, 3.0, 2)


def test_command_prints_a_table_with_intervals_and_doubts(measured, monkeypatch):
    bundle, record, _ = measured
    latency = {**record["latency_ms"], "p50": 1.25, "ci95_p50": [1.2, 1.3], "p99": None, "ci95_p99": None}
    done, asked = run_command(monkeypatch, {**record, "latency_ms": latency, "marks": ["drift"]}, bundle)
    assert "1.25 ms  [1.2, 1.3]" in done.stdout
    assert "under 1,000 runs" in done.stdout
    assert "drift" in done.stdout
    assert (asked["duration_s"], asked["threads"]) == (10.0, None)


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--duration-s", "-1"], ["--threads", "x"]])
def test_wrong_usage_exits_2(bundle, monkeypatch, arguments):
    done, _ = run_command(monkeypatch, {}, bundle, *arguments)
    assert done.exit_code == 2
