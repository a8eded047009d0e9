"""Targets: the packaged ones, and what a target refuses."""

from __future__ import annotations

import pytest

from edgecl.config.settings import packaged_files
from edgecl.config.target import Target, list_targets, read_target, target_name
from edgecl.errors import TargetError

PACKAGED = packaged_files("export")


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_target_parses(name):
    assert isinstance(read_target(name), Target)


def test_ort_cpu_is_static_float32_at_opset_15():
    target = read_target("ort-cpu")
    assert (target.runtime, target.precisions) == ("onnxruntime", ("fp32",))
    assert (target.graph.opset, target.graph.batch, target.graph.dynamic_batch) == (15, 1, False)


def test_list_gives_name_and_summary_of_each():
    assert [entry["name"] for entry in list_targets()] == sorted(PACKAGED)
    assert all(entry.keys() == {"name", "summary"} and entry["summary"] for entry in list_targets())


def test_unknown_name_suggests_a_near_one():
    with pytest.raises(TargetError) as caught:
        read_target("ort-cp")
    assert caught.value.problem == "unknown target 'ort-cp'"
    assert "'ort-cpu'" in caught.value.hint


def test_batch_above_its_limit_is_refused_with_both(write):
    text = 'runtime = "onnxruntime"\n[graph]\nbatch = 32\ndynamic_batch = true\nmax_batch = 8\n'
    with pytest.raises(TargetError, match=r"'graph\.batch' 32 is above 'graph\.max_batch' 8"):
        read_target(write(text))


def test_several_problems_are_reported_at_once(write):
    with pytest.raises(TargetError, match=r"missing key 'runtime'; .*'graph\.opset' is 9"):
        read_target(write("[graph]\nopset = 9\n"))


def test_jetson_is_an_alias_of_orin_with_jetpack_6():
    assert target_name("jetson") == "jetson-orin-jp6"
    assert read_target("jetson") == read_target("jetson-orin-jp6")


def test_alias_of_an_alias_is_refused(write):
    with pytest.raises(TargetError, match=r"is an alias of 'jetson', which is an alias itself"):
        read_target(write('alias = "jetson"\n'))


def test_nano_target_has_no_int8_opset_13_and_no_hard_swish_node():
    target = read_target("jetson-nano-jp4")
    assert "int8" not in target.precisions
    assert target.graph.opset == 13
    assert target.graph.hard_swish != "keep"


@pytest.mark.parametrize(
    ("text", "exc"),
    [
        (
            'runtime = "tensorrt"\ndevice = "jetson-nano"\nprecisions = ["int8"]\n',
            r"'precisions' asks for int8, which Jetson Nano cannot compute; it has fp32, fp16",
        ),
        (
            'runtime = "tensorrt"\ndevice = "jetson-orin"\nprecisions = ["fp8"]\n',
            r"'precisions' asks for fp8, which any Jetson Orin cannot compute; it has fp32, fp16, int8",
        ),
        (
            'runtime = "tensorrt"\ndevice = "jetson-thor"\nprecisions = ["fp8"]\n',
            r"'precisions' asks for fp8, which edgecl does not make; take int8 or fp16",
        ),
        (
            'runtime = "tensorrt"\ndevice = "jetson-orin-nano"\nprecisions = ["fp16"]\n[build]\ndla_core = 0\n',
            r"'build\.dla_core' = 0, but Jetson Orin Nano has 0 DLA cores",
        ),
        (
            'runtime = "tensorrt"\ndevice = "jetson-orin"\nprecisions = ["fp16"]\n[build]\ndla_core = 0\n',
            r"not every module of 'jetson-orin' has DLA; name the module as 'device'",
        ),
        (
            'runtime = "tensorrt"\ndevice = "jetson-agx-orin"\nprecisions = ["fp16"]\n[build]\ndla_core = 1\n'
            "[graph]\ndynamic_batch = true\n",
            r"'build\.dla_core' needs a static batch",
        ),
        (
            'runtime = "tensorrt"\ndevice = "gpu"\nprecisions = ["int8"]\n[graph]\nint8 = "int8-cpu"\n',
            r"'tensorrt' does not take 'graph\.int8' = 'int8-cpu'; take 'int8-trt'",
        ),
        (
            'runtime = "tensorrt"\ndevice = "gpu"\n[graph]\nopset = 13\nhard_swish = "keep"\n',
            r"'graph\.hard_swish' = 'keep' needs opset 14, 'graph\.opset' is 13",
        ),
        (
            'runtime = "tensorrt"\n[graph]\nopset = 17\nint8 = "int8-trt-fp16"\n',
            r"needs opset 19, 'graph\.opset' is 17",
        ),
        (
            'runtime = "tensorrt"\ndevice = "gpu"\nversions = "10.3"\n',
            r"'10\.3' is no bound of versions",
        ),
        (
            'runtime = "tensorrt"\ndevice = "jetson"\n',
            r"'device' is 'jetson'; there are cpu, gpu, jetson-nano",
        ),
        ('runtime = "tensorrt_rtx"\ndevice = "gpu"\n', r"'build\.compute_capabilities' is empty"),
        ('runtime = "onnxruntime"\nprecisions = ["fp32", "fp32"]\n', r"each once"),
        (
            'runtime = "onnxruntime"\ndevice = ["cpu"]\n',
            r"'device' is \['cpu'\]: input should be a valid string",
        ),
        ('runtime = "tensorrt"\n', r"'tensorrt' does not run on 'device' = 'cpu'; it runs on gpu and jetson"),
        ('runtime = "tensorrt_rtx"\ndevice = "jetson-orin"\n', r"does not run on 'device' = 'jetson-orin'"),
        ('runtime = "onnxruntime"\ndevice = "gpu"\n', r"does not run on 'device' = 'gpu'; it runs on cpu"),
        ('runtime = "tensorrt"\ndevice = "gpu"\nversions = ">=12,<11"\n', r"holds no version"),
        (
            'runtime = "tensorrt"\ndevice = "jetson-nano"\nversions = ">=8.2,<8.3"\n[graph]\nopset = 17\n',
            r"'graph\.opset' is 17, TensorRT 8\.2 reads up to 13",
        ),
        (
            'runtime = "onnxruntime"\nprecisions = ["int8"]\n[graph]\nopset = 17\nint8 = "int8-trt"\n',
            r"take 'int8-cpu'",
        ),
        ('runtime = "onnxruntime"\n[quantization]\nmethods = []\n', r"'quantization\.methods'"),
    ],
)
def test_target_that_its_device_cannot_serve_is_refused(write, text, exc):
    with pytest.raises(TargetError, match=exc):
        read_target(write(text))


def test_dla_of_a_module_that_has_it_is_accepted(write):
    text = 'runtime = "tensorrt"\ndevice = "jetson-agx-orin"\nprecisions = ["fp16"]\n[build]\ndla_core = 1\n'
    assert read_target(write(text)).build.dla_core == 1
