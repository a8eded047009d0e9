"""The host's `bench`: a real process that measures, and what becomes of one that fails."""

import json
import shutil
import subprocess
import sys

import pytest
import typer
from onboard.tiny_bundle import make_bundle
from typer.testing import CliRunner

import edgecl.deploy.device
import edgecl.deploy.process
from edgecl.cli.bench import bench_command
from edgecl.deploy.device import bench
from edgecl.errors import ArtifactError, DeviceError
from edgecl.onboard.bundle import sha256_of_file, slug
from edgecl.storage.records import BenchRecord


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A bundle, its record, and the lines told while measuring two precisions for a moment in a real process."""
    bundle = make_bundle(tmp_path_factory.mktemp("bench") / "bundle", precisions=("fp32", "int8"))
    lines = []
    record = bench(
        bundle, precisions=["fp32", "int8"], runtime="ort", duration_s=0.2, threads=1, report=lines.append
    )
    return bundle, record.to_json(), lines


def test_record_begins_with_its_header_and_is_kept_under_what_was_measured(measured):
    bundle, record, _ = measured
    assert list(record)[:5] == ["schema", "kind", "made_by", "made_from", "command"]
    assert record["kind"] == "bench"
    assert record["made_from"] == sha256_of_file(bundle / "manifest.json")
    name = f"bench-{slug(record['device']['name'])}-onnxruntime-fp32+int8-1t-b1.json"
    assert json.loads((bundle / name).read_text()) == record


def test_record_holds_the_conditions(measured):
    _, record, _ = measured
    assert record["threads"] == record["device"]["threads"] == 1
    assert "edgecl.onboard" not in record["command"]
    assert " -m edgecl.onboard bench " in record["onboard_command"]
    assert record["environment"]["OMP_NUM_THREADS"] == "1"
    assert record["measurements"][0]["settings"]["intra_op_num_threads"] == 1
    assert record["device"]["versions"]["onnxruntime"] in record["runtime"]
    assert [(one["a"], one["b"]) for one in record["ratios"]] == [("fp32", "int8")]


def test_measuring_process_imports_no_torch_and_nothing_else_of_edgecl(bundle):
    code = (
        "import sys; from edgecl.onboard.__main__ import main; main(sys.argv[1:]); "
        "names = [name for name in sys.modules if name.split('.')[0] in ('torch', 'edgecl')]; "
        "print([name for name in names if name != 'edgecl' and not name.startswith('edgecl.onboard')])"
    )
    command = [sys.executable, "-c", code, "bench", str(bundle), "--duration-s", "0.01", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def in_place_of_the_device_code(monkeypatch, code):
    monkeypatch.setattr(edgecl.deploy.process, "_ONBOARD", [sys.executable, "-c", code])


def test_crashed_process_is_reported_with_its_last_words(bundle, monkeypatch):
    in_place_of_the_device_code(monkeypatch, "raise SystemExit('the roof is on fire')")
    with pytest.raises(DeviceError, match=r"exit status 1 .*no record") as caught:
        bench(bundle)
    assert caught.value.where["it said"] == "the roof is on fire"


def test_precision_that_the_bundle_lacks_is_named_before_anything_runs(bundle, monkeypatch):
    in_place_of_the_device_code(monkeypatch, "raise SystemExit('it ran')")
    with pytest.raises(ArtifactError, match=r"no int8 .*has fp32") as caught:
        bench(bundle, precisions=["int8"])
    assert "--precision int8" in caught.value.hint


def test_record_of_something_else_is_refused_and_names_no_file(bundle, monkeypatch):
    answer = {"runtime": "ort", "batch": 1, "threads": 1, "device": {"name": "d"}}
    answer["measurements"] = [{"precision": "../../x", "latency_ms": {}}]
    in_place_of_the_device_code(monkeypatch, f"print({json.dumps(answer)!r})")
    with pytest.raises(DeviceError, match=r"record is of \.\./\.\./x,.* not hold"):
        bench(bundle)
    del answer["threads"]
    in_place_of_the_device_code(monkeypatch, f"print({json.dumps(answer)!r})")
    with pytest.raises(ArtifactError, match="'threads': field required"):
        bench(bundle)
    assert sorted(path.name for path in bundle.iterdir()) == ["manifest.json", "model.onnx", "reference.npz"]


def test_progress_cannot_move_the_terminals_cursor(bundle, monkeypatch):
    code = "import sys; sys.stderr.write('bench: \\x1b[2Jall is well\\n'); raise SystemExit('\\x1b]0;x\\x07 ended')"
    in_place_of_the_device_code(monkeypatch, code)
    lines = []
    with pytest.raises(DeviceError) as caught:
        bench(bundle, report=lines.append)
    assert lines == ["[2Jall is well"]
    assert caught.value.where["it said"] == "]0;x ended"


def test_options_reach_the_device_code(bundle, monkeypatch):
    in_place_of_the_device_code(monkeypatch, "import sys; raise SystemExit(' '.join(sys.argv[1:]))")
    with pytest.raises(DeviceError) as caught:
        bench(bundle, precisions=["fp32"], runtime="trtexec", duration_s=2.5, threads=2, power=False)
    assert caught.value.where["it said"] == (
        f"bench {bundle} --runtime trtexec --precision fp32 --duration-s 2.5 --no-power --threads 2"
    )


def run_command(monkeypatch, record, *arguments):
    asked = {}

    def fake(bundle, **settings):
        asked.update(settings, bundle=bundle)
        settings["report"]("measuring: 1 s")
        return BenchRecord.model_validate(record)

    monkeypatch.setattr(edgecl.deploy.device, "bench", fake)
    app = typer.Typer()
    app.command()(bench_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments]), asked


def test_command_prints_one_json_object_and_progress_apart(measured, monkeypatch):
    bundle, record, _ = measured
    done, asked = run_command(
        monkeypatch,
        record,
        *(bundle, "--duration-s", "3", "--threads", "2", "--json", "--precision", "fp32,int8"),
        *("--runtime", "ort", "--host", "me@board"),
    )
    assert json.loads(done.stdout) == record
    assert done.stderr == "measuring: 1 s\n"
    assert (asked["bundle"], asked["duration_s"], asked["threads"]) == (bundle, 3.0, 2)
    assert (asked["precisions"], asked["runtime"], asked["host"]) == (["fp32", "int8"], "ort", "me@board")


def test_another_power_mode_is_another_file(measured, tmp_path, monkeypatch):
    bundle = shutil.copytree(measured[0], tmp_path / "b")
    names = set()
    for mode in ("15W", "MAXN"):
        device = {**measured[1]["device"], "name": "Jetson Orin Nano", "power_mode": {"id": 0, "name": mode}}
        record = {**measured[1], "device": device}
        monkeypatch.setattr(
            "edgecl.deploy.device.run_here", lambda verb, record=record, **options: {**record}
        )
        before = set(bundle.glob("bench-*.json"))
        bench(bundle)
        names |= {path.name.split("-onnxruntime")[0] for path in set(bundle.glob("bench-*.json")) - before}
    assert names == {"bench-jetson-orin-nano-15w", "bench-jetson-orin-nano-maxn"}


def test_command_prints_a_row_per_precision_and_mode_with_doubts_in_words(measured, monkeypatch):
    bundle, record, _ = measured
    monkeypatch.setenv("COLUMNS", "200")
    first, second = record["measurements"]
    latency = {**first["latency_ms"], "p50": 1.25, "ci95_p50": [1.2, 1.3], "p99": None, "ci95_p99": None}
    energy = {"rails": ["VDD_IN"], "j_per_inference": 0.01234, "idle_w": 4.0, "load_w": 9.0}
    changed = {
        **record,
        "measurements": [
            {**first, "latency_ms": latency, "energy": energy, "marks": ["drift"]},
            {**second, "energy": None, "marks": [], "samples": None, "throughput_per_s": None},
        ],
        "ratios": [{"a": "fp32", "b": "int8", "p50_ratio": 2.5, "ci95": [2.4, 2.6]}],
        "marks": ["throttled: GPU clock below its lock of 1020 MHz in 5 % of 60 looks"],
    }
    done, asked = run_command(monkeypatch, changed, bundle)
    assert "1.25 [1.2, 1.3]" in done.stdout
    assert "too few runs" in done.stdout
    assert "0.0123" in done.stdout
    assert "int8 is 2.5 [2.4, 2.6] times as fast as fp32" in done.stdout
    assert "energy of the whole module: VDD_IN" in done.stdout
    assert "doubtful: throttled: GPU clock below its lock of 1020 MHz in 5 % of 60 looks" in done.stdout
    assert "doubtful: fp32, inference: the last quarter ran over 3 % slower than the first" in done.stdout
    assert (asked["duration_s"], asked["threads"], asked["precisions"]) == (10.0, None, None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "0"],
        ["--duration-s", "-1"],
        ["--threads", "x"],
        ["--precision", "fp64"],
        ["--runtime", "x"],
    ],
)
def test_wrong_usage_exits_2(bundle, monkeypatch, arguments):
    done, _ = run_command(monkeypatch, {}, bundle, *arguments)
    assert done.exit_code == 2
