"""trtexec's command lines per version, and the script that picks the version's."""

import json
import subprocess

import pytest

from edgecl.deploy.handover.trtexec import script
from edgecl.onboard.errors import DeviceError
from edgecl.onboard.trtexec import read_times
from edgecl.onboard.trtexec_flags import MODES, Net, bench_command, build_command

from .fake_trtexec import FLAGS, make_trtexec
from .trtexec_bundle import BUILD, DYNAMIC, STATIC, bench, calls, lines, manifest_of, write_bundle

# --- exact commands ---


POOL = "--memPoolSize=workspace:1024"
SINCE_8_6 = f"{POOL} --builderOptimizationLevel=5 --profilingVerbosity=detailed --skipInference"


@pytest.mark.parametrize(
    ("version", "form", "expected"),
    [
        ("8.2.1", "fp16", "--fp16 --workspace=1024 --profilingVerbosity=detailed --buildOnly"),
        ("8.2.1", "fp32", "--workspace=1024 --profilingVerbosity=detailed --buildOnly"),
        ("8.5.2", "int8-trt", f"--int8 --fp16 {POOL} --profilingVerbosity=detailed --buildOnly"),
        ("8.6.2", "fp16", f"--fp16 {SINCE_8_6}"),
        ("10.3.0", "int8-trt", f"--int8 --fp16 {SINCE_8_6}"),
        (
            "10.3.0",
            "int8-trt-fp16",
            f"--stronglyTyped {SINCE_8_6}",
        ),  # fp16 scales are for strongly typed networks
        ("10.16.2", "fp16", f"--stronglyTyped {SINCE_8_6}"),
        ("11.1.0", "int8-trt-fp16", SINCE_8_6),
    ],
)
def test_build_command_of_each_version(version, form, expected):
    precision = form.partition("-")[0]
    head = ["trtexec", f"--onnx=model.{precision}.onnx", "--saveEngine=e.plan"]
    assert lines(version, precision, form)["build"] == head + expected.split()


OLD = "--duration=60 --iterations=1024 --avgRuns=100 --percentile=99 --streams=1 --useSpinWait"
NEW = "--duration=60 --iterations=1024 --avgRuns=100 --percentile=50,90,95,99 --infStreams=1 --useSpinWait"


@pytest.mark.parametrize(
    ("version", "mode", "expected"),
    [
        ("8.2.1", "compute, CUDA graph", OLD + " --useCudaGraph --noDataTransfers"),
        ("8.5.2", "compute", OLD + " --noDataTransfers"),
        ("8.6.2", "with transfers", NEW),
        ("10.3.0", "compute, CUDA graph", NEW + " --useCudaGraph --noDataTransfers"),
        ("10.3.0", "with transfers, CUDA graph", NEW + " --useCudaGraph"),
        ("10.16.2", "with transfers", NEW),
        # From 11.0 on the defaults are the other way round.
        ("11.0.0", "compute, CUDA graph", NEW + " --useCudaGraph --noDataTransfers"),
        ("11.0.0", "compute", NEW + " --noCudaGraph --noDataTransfers"),
        ("11.0.0", "with transfers, CUDA graph", NEW + " --useCudaGraph --includeDataTransfers"),
        ("11.4.1", "with transfers", NEW + " --noCudaGraph --includeDataTransfers"),
    ],
)
def test_bench_command_of_each_version_and_mode(version, mode, expected):
    expected = ["trtexec", "--loadEngine=e.plan", "--warmUp=2000", *expected.split()]
    written = ["--separateProfileRun", "--exportTimes=t.json", "--exportLayerInfo=l.json"]
    assert bench(version, mode) == expected + written


def test_command_lines_time_the_headline_mode_and_export_the_layers():
    files = ["--exportTimes=e.times.json", "--exportLayerInfo=e.layers.json"]
    assert lines("10.3")["bench"] == bench("10.3", MODES[0])[:-2] + files


def test_the_lowest_version_of_a_range_counts():
    assert lines(">=10.3,<10.8") == lines("10.3.0")
    assert lines(">=10.13,<12") == lines("10.13.3")
    assert lines("") == lines("8.2.1")
    assert lines(">=8.0,<8.3") == lines("8.2.1")


def test_shapes_are_said_only_where_the_batch_is_dynamic_and_tf32_only_where_it_is_off():
    static, dynamic = lines("10.3"), lines("10.3", build={**BUILD, "tf32": False}, manifest_input=DYNAMIC)
    assert not [word for command in static.values() for word in command if "hapes" in word or "TF32" in word]
    shapes = ["--minShapes=input:1x3x96x96", "--optShapes=input:16x3x96x96", "--maxShapes=input:64x3x96x96"]
    assert [word for word in dynamic["build"] if "hapes" in word] == shapes
    assert [word for word in dynamic["bench"] if "hapes" in word] == ["--shapes=input:16x3x96x96"]
    assert "--noTF32" in dynamic["build"]


def test_dla_gets_its_core_its_memory_and_the_gpu_for_the_rest():
    build = {**BUILD, "dla_core": 1}
    command = lines("8.5", "int8", "int8-trt", build)
    pools = "--memPoolSize=workspace:1024,dlaSRAM:1,dlaLocalDRAM:1024,dlaGlobalDRAM:512"
    assert command["build"][3:8] == ["--int8", "--fp16", "--useDLACore=1", "--allowGPUFallback", pools]
    assert command["bench"][2] == "--useDLACore=1"
    assert lines("8.2", build=build)["build"][5:7] == ["--allowGPUFallback", "--workspace=1024"]
    assert "--adjustForDLA" in lines("11.4.1", build=build)["build"]
    assert lines("10.3", "fp32", build=build) == lines("10.3", "fp32")  # DLA computes no fp32


@pytest.mark.parametrize("version", ["10.8", ">=10.12,<11", "11.3.1"])
def test_dla_is_refused_for_versions_without_it(version):
    with pytest.raises(
        DeviceError, match=r"^TensorRT 1[\d.]+ has no DLA; 8\.2 to 10\.7 have it, and 11\.4 on AGX Orin$"
    ):
        lines(version, build={**BUILD, "dla_core": 0})


@pytest.mark.parametrize("version", ["8.0.1", ">=7,<8.2", "<8.2"])
def test_versions_before_8_2_are_refused(version):
    with pytest.raises(DeviceError, match="edgecl knows trtexec from TensorRT 8.2 on, not " + version):
        lines(version)


@pytest.mark.parametrize("version", FLAGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("precision", "form"), [("fp32", "fp32"), ("fp16", "fp16"), ("int8", "int8-trt")])
@pytest.mark.parametrize("manifest_input", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_every_flag_is_one_that_the_version_has(version, mode, precision, form, manifest_input):
    build = {**BUILD, "tf32": False, "dla_core": None if version == "10.13.3" or version == "11.1.0" else 0}
    net = Net(manifest_input, build, precision, form, "m.onnx")
    commands = [
        build_command(version, net, "e"),
        bench_command(version, net, "e", mode=mode, times="t", layers="l"),
    ]
    used = [word[2:].partition("=")[0] for command in commands for word in command[1:]]
    assert set(used) <= set(FLAGS[version].split())
    assert all(len(set(command)) == len(command) for command in commands)


# --- the script ---


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path)


def run_script(bundle, manifest, program, *arguments):
    path = bundle / "trtexec.sh"
    commands = {name: about["trtexec"] for name, about in manifest["precisions"].items()}
    path.write_text(script(commands, default="fp16", versions=manifest["target"]["versions"]))
    return subprocess.run(
        ["sh", str(path), *arguments],
        env={"TRTEXEC": str(program), "PATH": "/usr/bin:/bin"},
        cwd="/",
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("version", "versions", "precision"),
    [("8.2.1", ">=8.2,<8.3", "fp16"), ("10.3.0", ">=10.3,<10.8", "int8"), ("11.1.0", ">=11.1,<12", "fp16")],
)
def test_script_runs_the_commands_of_the_manifest(tmp_path, bundle, version, versions, precision):
    program = make_trtexec(tmp_path / "bin", version)
    manifest = manifest_of(versions=versions)
    done = run_script(bundle, manifest, program, *([] if precision == "fp16" else [precision]))
    assert done.returncode == 0, done.stdout + done.stderr
    expected = manifest["precisions"][precision]["trtexec"]
    assert calls(program) == [expected["build"][1:], expected["bench"][1:]]
    assert len(json.loads((bundle / f"{precision}.layers.json").read_text())["Layers"]) == 3
    assert len(read_times(bundle / f"{precision}.times.json")["compute"]) == 1024


def test_script_refuses_an_unknown_precision_and_a_missing_trtexec(tmp_path, bundle):
    done = run_script(bundle, manifest_of(), make_trtexec(tmp_path / "b", "10.3.0"), "fp8")
    expected = "this bundle has no precision 'fp8'; it has fp16, int8, fp32\n"
    assert (done.returncode, done.stderr) == (2, expected)
    done = run_script(bundle, manifest_of(), tmp_path / "no trtexec")
    assert done.returncode == 1
    assert "set TRTEXEC to where it is (package libnvinfer-bin)" in done.stderr


def test_script_stops_at_a_build_that_fails(tmp_path, bundle):
    program = make_trtexec(tmp_path / "bin", "10.3.0", fault="parse")
    assert run_script(bundle, manifest_of(), program).returncode == 1
    assert len(calls(program)) == 1
