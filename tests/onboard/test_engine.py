"""What is asked of each version of TensorRT, against a fake that has the attributes of that version and no others."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import edgecl
from edgecl.onboard.build import build
from edgecl.onboard.bundle import sha256_of_file
from edgecl.onboard.engine import build_plan, import_runtime, is_strongly_typed
from edgecl.onboard.errors import BundleError, DeviceError
from onboard.engine_bundle import install, make_engine_bundle, net
from onboard.tiny_bundle import read_manifest, write_manifest

VERSIONS = ["8.2.1.8", "8.5.2.2", "8.6.2.3", "10.3.0.30", "10.16.2.10", "11.4.1.9"]
MIB = 1 << 20
INPUT = {"name": "input", "shape": [1, 3, 8, 8], "dynamic_batch": False, "max_batch": 1}
BUILD = {"workspace_mib": 256, "optimization_level": 5, "tf32": True, "dla_core": None}


@pytest.fixture
def make(tmp_path):
    """Build the plan of a precision with the TensorRT that is installed."""

    def make(precision, *, form=None, build=BUILD, input_form=INPUT, **options):
        form = form or {"int8": "int8-trt"}.get(precision, precision)
        file = tmp_path / f"{form}.onnx"
        onnx.save(net(form, batch="N" if input_form["dynamic_batch"] else 1), file)
        return build_plan(
            file,
            runtime="tensorrt",
            precision=precision,
            form=form,
            build=build,
            input_form=input_form,
            **options,
        )

    return make


# --- the calls of each version, whole ---

OF_8_2 = [
    "create_network(1)",
    "parse_from_file",
    "set_flag(FP16)",
    f"max_workspace_size = {150 * MIB}",
    "set_flag(TF32)",
    "profiling_verbosity = ProfilingVerbosity.DETAILED",
    "set_timing_cache(0 bytes, False) -> True",
    "build_serialized_network",
]


def test_calls_of_8_2(monkeypatch, make):
    fake, _ = install(monkeypatch, "8.2.1.8")
    make("fp16", free_bytes=300 * MIB)
    assert fake.calls == OF_8_2


@pytest.mark.parametrize(
    ("version", "kind", "precision", "flags"),
    [
        ("8.6.2.3", 1, "int8", ["set_flag(INT8)", "set_flag(FP16)"]),
        # Strongly typed: the graph decides.
        ("10.16.2.10", 2, "fp16", []),
        ("10.16.2.10", 2, "int8", []),
        ("11.4.1.9", 1, "fp32", []),
        ("11.4.1.9", 1, "int8", []),
    ],
)
def test_calls_of_later_versions(monkeypatch, make, version, kind, precision, flags):
    fake, _ = install(monkeypatch, version)
    make(precision, build={**BUILD, "tf32": False}, timing_cache=b"old")
    assert fake.calls == [
        f"create_network({kind})",
        "parse_from_file",
        *flags,
        f"set_memory_pool_limit(WORKSPACE, {256 * MIB})",
        "builder_optimization_level = 5",
        "clear_flag(TF32)",
        "profiling_verbosity = ProfilingVerbosity.DETAILED",
        "set_timing_cache(3 bytes, False) -> True",
        "build_serialized_network",
    ]


@pytest.mark.parametrize("version", ["8.2.1.8", "8.5.2.2", "8.6.2.3", "10.3.0.30"])
def test_weakly_typed_versions_get_builder_flags(monkeypatch, make, version):
    fake, _ = install(monkeypatch, version)
    flags = [make(name).settings["flags"] for name in ("fp32", "fp16", "int8")]
    assert flags == [[], ["FP16"], ["INT8", "FP16"]]
    fake.behavior.fast["fp16"] = False
    assert make("int8").settings["flags"] == ["INT8"]


@pytest.mark.parametrize(
    ("runtime", "version", "form", "typed"),
    [
        ("tensorrt", (8, 2, 1), "fp16", False),
        ("tensorrt", (10, 3, 0), "int8-trt", False),
        ("tensorrt", (10, 3, 0), "int8-trt-fp16", True),
        ("tensorrt", (10, 11, 0), "fp16", False),
        ("tensorrt", (10, 12, 0), "fp16", True),
        ("tensorrt", (11, 4, 1), "fp32", True),
        ("tensorrt_rtx", (1, 7, 1), "fp16", True),
    ],
)
def test_which_builds_are_strongly_typed(runtime, version, form, typed):
    assert is_strongly_typed(runtime, version, form) == typed


@pytest.mark.parametrize("version", VERSIONS)
def test_dynamic_batch_gets_a_profile(monkeypatch, make, version):
    fake, _ = install(monkeypatch, version)
    make("fp16", input_form={"name": "input", "shape": [4, 3, 8, 8], "dynamic_batch": True, "max_batch": 16})
    assert "set_shape(input, [1, 3, 8, 8], [4, 3, 8, 8], [16, 3, 8, 8])" in fake.calls


def test_one_logger_serves_all_builds(monkeypatch, make):
    fake, _ = install(monkeypatch, "10.3.0.30")
    make("fp32")
    make("fp16")
    assert len(fake.loggers) == 1


def test_timing_cache_of_another_device_is_replaced(monkeypatch, make):
    fake, _ = install(monkeypatch, "10.3.0.30")
    fake.behavior.timing_cache_fits = False
    assert make("fp32", timing_cache=b"old").timing_cache == b"timings"
    calls = [call for call in fake.calls if call.startswith("set_timing_cache")]
    assert calls == ["set_timing_cache(3 bytes, False) -> False", "set_timing_cache(0 bytes, False) -> True"]


# --- DLA ---


def test_dla_core_is_chosen_with_the_gpu_as_fallback_but_for_fp32(monkeypatch, make):
    fake, _ = install(monkeypatch, "8.5.2.2")
    fake.behavior.dla_cores = 2
    build = {**BUILD, "dla_core": 1}
    assert make("fp32", build=build).settings["dla_core"] is None
    assert not [call for call in fake.calls if "DLA" in call]
    assert make("fp16", build=build).settings["dla_core"] == 1
    assert {"default_device_type = DeviceType.DLA", "DLA_core = 1", "set_flag(GPU_FALLBACK)"} <= set(
        fake.calls
    )


def test_dla_core_that_is_not_there(monkeypatch, make):
    install(monkeypatch, "10.3.0.30")
    with pytest.raises(DeviceError) as caught:
        make("fp16", build={**BUILD, "dla_core": 0})
    for words in ("asked for DLA core 0", "TensorRT 10.3.0.30", "finds 0 DLA cores"):
        assert words in caught.value.problem
    assert "Orin Nano and Thor" in caught.value.hint


# --- asked for and not to be had ---


@pytest.mark.parametrize(("precision", "other"), [("fp16", "fp32"), ("int8", "fp16")])
def test_a_gpu_without_a_fast_precision(monkeypatch, make, precision, other):
    fake, _ = install(monkeypatch, "8.2.1.8")
    fake.behavior.fast[precision] = False
    with pytest.raises(DeviceError, match=f"{precision}, .*GPU cannot compute it fast") as caught:
        make(precision)
    assert caught.value.hint.endswith(f"--precision {other}")
    assert "build_serialized_network" not in fake.calls


@pytest.mark.parametrize("version", ["10.16.2.10", "11.4.1.9"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_graph_in_another_precision(monkeypatch, make, version, precision):
    install(monkeypatch, version)
    with pytest.raises(DeviceError) as caught:
        make(precision, form="fp32")
    for words in (f"asked for {precision} and not delivered", f"'fp32.onnx' is {precision} ", "(fp32 100 %)"):
        assert words in caught.value.problem


@pytest.mark.parametrize(("version", "form"), [("8.6.2.3", "int8-trt-fp16"), ("11.4.1.9", "int8-cpu")])
def test_a_form_that_the_version_does_not_take(monkeypatch, make, version, form):
    install(monkeypatch, version)
    with pytest.raises(DeviceError, match=f"TensorRT {version} .*no graph .*'{form}'") as caught:
        make("int8", form=form)
    assert "int8 = 'int8-trt'" in caught.value.hint


# --- parsing and building that fail ---


IMPORT = "In node 4 (importModel): UNSUPPORTED_NODE: No importer registered for op: HardSwish"


@pytest.mark.parametrize(
    ("version", "unparsed", "problem", "hint"),
    [
        ("8.2.1.8", (4, "", "", IMPORT), f"node 4 (HardSwish): {IMPORT}", "hard_swish = 'hard_sigmoid'"),
        (
            "10.3.0.30",
            (7, "conv_q", "QuantizeLinear", "Non-zero zero point is not supported."),
            "node 7 'conv_q' (QuantizeLinear): Non-zero zero point is not supported.",
            "symmetric INT8",
        ),
    ],
)
def test_a_node_that_a_version_does_not_take_is_named(monkeypatch, make, version, unparsed, problem, hint):
    fake, _ = install(monkeypatch, version)
    fake.behavior.unparsed = unparsed
    with pytest.raises(DeviceError) as caught:
        make("fp16")
    assert f"TensorRT {version} cannot read 'fp16.onnx'" in caught.value.problem
    assert caught.value.problem.endswith(problem)  # TensorRT's own words, whole
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("Error Code 2: OutOfMemory (no further information)", "lower build.workspace_mib in the target (it is 256)"),
        ("Requested amount of GPU memory (1073741824 bytes) could not be allocated.", "add swap"),
        ("Could not find any implementation for node conv.", "raise build.workspace_mib in the target (it is 256)"),
        ("DLA validation failed", "without build.dla_core"),
        ("Internal error", "take another precision"),
    ],
)  # fmt: skip
def test_build_that_fails_says_what_tensorrt_said_and_what_to_do(monkeypatch, make, said, hint):
    fake, _ = install(monkeypatch, "10.3.0.30")
    for failure in ("of an earlier build", said):
        fake.behavior.failure = failure
        with pytest.raises(DeviceError) as caught:
            make("fp16")
    for words in ("TensorRT 10.3.0.30", "cannot build", "fp16 engine", "'fp16.onnx'"):
        assert words in caught.value.problem
    assert caught.value.problem.endswith(f": {said}")  # TensorRT's own words, whole
    assert hint in caught.value.hint


def test_builder_that_cannot_be_made_without_a_gpu(monkeypatch, make):
    fake, _ = install(monkeypatch, "10.3.0.30")

    def refuse(logger):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(fake, "Builder", refuse)
    with pytest.raises(DeviceError, match=r"cannot make a builder: pybind11::init\(\)") as caught:
        make("fp16")
    assert "needs a GPU" in caught.value.hint


def test_graph_with_another_input_than_the_manifest_says(monkeypatch, make):
    install(monkeypatch, "10.3.0.30")
    with pytest.raises(BundleError, match=r"\['input'\] .*\['output'\], the manifest says .*images"):
        make("fp16", input_form={**INPUT, "name": "images"})


def test_missing_runtime_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DeviceError, match="the runtime 'tensorrt' cannot be imported by") as caught:
        import_runtime("tensorrt")
    assert "python3-libnvinfer" in caught.value.hint


# --- the verb ---


def test_build_builds_every_precision_and_says_what_came_out(monkeypatch, tmp_path):
    _, cuda = install(monkeypatch, "10.3.0.30")
    bundle = make_engine_bundle(tmp_path / "bundle")
    said = []
    record = json.loads(json.dumps(build(bundle, report=said.append)))
    assert record["ok"] is True
    assert record["runtime"] == "tensorrt 10.3.0.30"
    shares = {name: about["shares"] for name, about in record["precisions"].items()}
    assert shares == {"fp16": {"fp16": 1.0}, "fp32": {"fp32": 1.0}, "int8": {"int8": 1.0}}
    assert all((bundle / about["file"]).is_file() for about in record["precisions"].values())
    assert [line.split(";")[0] for line in said if line.startswith("building")] == [
        f"building an {name} engine with TensorRT 10.3.0.30" for name in ("fp16", "fp32", "int8")
    ]
    assert cuda.live() == 0
    assert {about["cached"] for about in build(bundle)["precisions"].values()} == {True}


# --- Python 3.6, as on a Nano ---


def python36():
    """Return a Python 3.6 that has NumPy and onnxruntime, or skip."""
    for python in filter(None, (os.environ.get("EDGECL_PYTHON36"), shutil.which("python3.6"))):
        words = [python, "-c", "import numpy, onnxruntime, sys; sys.exit(sys.version_info[:2] != (3, 6))"]
        if subprocess.run(words, capture_output=True).returncode == 0:
            return python
    pytest.skip("no Python 3.6 with NumPy and onnxruntime; name one in EDGECL_PYTHON36")


ON_A_NANO = """
import json, sys, types
sys.modules["edgecl"] = types.ModuleType("edgecl")  # the host's own file there is not of Python 3.6
sys.modules["edgecl"].__path__ = [sys.argv[2] + "/edgecl"]
from onboard.fake_cudart import FakeCudart
from onboard.fake_tensorrt import FakeTensorrt
from edgecl.onboard import cudart
cuda = FakeCudart(version=10020, gpu=b"NVIDIA Tegra X1", capability=(5, 3))
cudart.open_libraries = lambda: iter([("libcudart.so.10.2", cuda)])
sys.modules["tensorrt"] = fake = FakeTensorrt("8.2.1.8", cuda)
import numpy as np
from edgecl.onboard.bundle import read_manifest
from edgecl.onboard.build import build
from edgecl.onboard.runtimes import open_session
bundle = sys.argv[1]
record = build(bundle, precisions=["fp16"])
session = open_session(bundle, read_manifest(bundle), precision="fp16", threads=1)
reference = np.load(bundle + "/reference.npz")
images = reference["inputs"][:1]
difference = float(np.abs(session.run(images) - reference["outputs"][:1]).max())
session.bind(images)
seconds = {mode: session.run_once(mode) for mode in session.modes()}
about = session.describe()
session.close()
print(json.dumps({"calls": fake.calls, "difference": difference, "seconds": seconds, "engine": record["precisions"],
                  "settings": about["settings"], "versions": about["versions"], "live": cuda.live()}))
"""


def test_tensorrt_8_2_under_python_3_6(tmp_path):
    python = python36()
    bundle = make_engine_bundle(tmp_path / "bundle")
    # onnxruntime of that age reads file versions up to 8.
    model = net("fp32", batch=1)
    model.ir_version, model.opset_import[0].version = 7, 13
    onnx.save(model, bundle / "model.fp16.onnx")
    manifest = read_manifest(bundle)
    manifest["files"]["model.fp16.onnx"] = sha256_of_file(bundle / "model.fp16.onnx")
    write_manifest(bundle, manifest)
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [python, "-c", ON_A_NANO, str(bundle), str(repository)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["difference"] < 1e-3
    assert seen["calls"][:8] == [
        {"set_flag(TF32)": "clear_flag(TF32)"}.get(call, call.replace(str(150 * MIB), str(256 * MIB)))
        for call in OF_8_2
    ]
    assert "execute_async_v2" in seen["calls"]
    assert "execute_async_v3" not in seen["calls"]
    assert seen["engine"]["fp16"]["shares"] == {"fp16": 1.0}
    assert "engine-fp16-nvidia-tegra-x1-sm53-8mp-tensorrt-8-2-1-8-" in seen["engine"]["fp16"]["file"]
    assert seen["versions"]["cuda_runtime"] == "10.2"
    assert seen["seconds"] == {
        "compute, CUDA graph": pytest.approx(0.003),
        "compute": pytest.approx(0.004),
        "with transfers, CUDA graph": pytest.approx(0.005),
        "with transfers": pytest.approx(0.006),
    }
    assert seen["live"] == 0


# --- the official API ---


def repaired_stubs(target):
    """Copy the official stubs, with the few lines that are no Python replaced; return how many those were."""
    found = importlib.util.find_spec("tensorrt_stubs")
    if found is None or importlib.util.find_spec("mypy") is None:
        pytest.skip("tensorrt-stubs or mypy is not installed")
    packages = Path(found.origin).parents[1]
    for name in ("tensorrt", "tensorrt_bindings"):
        shutil.copytree(packages / name, target / name)
    file = target / "tensorrt_bindings" / "tensorrt.pyi"
    lines = file.read_text(encoding="utf-8").splitlines()
    for count in range(20):
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            line = lines[error.lineno - 1]
            indent, _, rest = line.partition("def ")
            lines[error.lineno - 1] = (
                f"{indent}def {rest.partition('(')[0]}(self, *args: typing.Any) -> typing.Any:"
            )
            continue
        file.write_text("\n".join(lines), encoding="utf-8")
        return count
    pytest.fail("the stubs hold more than 20 lines that are no Python")


def type_check(tmp_path, package):
    """Type-check the device code in a copy of the package, against the stubs; return mypy's complaints on it."""
    settings = tmp_path / "mypy.ini"
    settings.write_text(
        "[mypy]\nstrict = True\nwarn_unreachable = True\nuntyped_calls_exclude = torch\n"
        "[mypy-tensorrt.*,tensorrt_bindings.*]\nignore_errors = True\n"
        "[mypy-onnx.*,onnxruntime.*,openvino.*]\nignore_missing_imports = True\n"
    )
    onboard = package / "onboard"
    files = [onboard / "engine.py", onboard / "runtimes" / "tensorrt.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", settings, "--cache-dir", tmp_path / "cache", *files],
        capture_output=True,
        text=True,
        # A copy's own folder: beside an installed package lie modules that mypy takes for the user's.
        cwd=package.parent,
        env={**os.environ, "MYPYPATH": str(tmp_path / "stubs")},
    )
    assert "crash" not in done.stderr.lower(), done.stderr
    assert "prevented further checking" not in done.stdout, done.stdout
    return [line for line in done.stdout.splitlines() if "tensorrt.py:" in line or "engine.py:" in line]


@pytest.mark.slow
def test_code_type_checks_against_the_official_stubs(tmp_path):
    repaired_stubs(tmp_path / "stubs")
    copy = tmp_path / "source" / "edgecl"
    shutil.copytree(Path(edgecl.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert not type_check(tmp_path, copy)
    # The check can fail: a call that the API does not have is found.
    engine = copy / "onboard" / "engine.py"
    text = engine.read_text(encoding="utf-8")
    engine.write_text(text.replace("config.clear_flag", "config.clear_the_flag"), encoding="utf-8")
    assert any('has no attribute "clear_the_flag"' in line for line in type_check(tmp_path, copy))
