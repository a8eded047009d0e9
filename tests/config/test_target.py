"""Targets: the packaged ones, and what a target refuses."""

from __future__ import annotations

import re

import pytest

from edgecl.config.settings import list_packaged, packaged_files
from edgecl.config.target import Target, read_target, target_name
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


@pytest.mark.parametrize("folder", ["export", "recipes"])
def test_list_gives_name_and_summary_of_each(folder):
    listed = list_packaged(folder)
    assert [entry["name"] for entry in listed] == sorted(packaged_files(folder))
    assert all(entry.keys() == {"name", "summary"} and len(entry["summary"]) > 20 for entry in listed)


def test_jetson_is_an_alias_of_orin_with_jetpack_6():
    assert target_name("jetson") == "jetson-orin-jp6"
    assert read_target("jetson") == read_target("jetson-orin-jp6")


def test_nano_target_has_no_int8_opset_13_and_no_hard_swish_node():
    target = read_target("jetson-nano-jp4")
    assert "int8" not in target.precisions
    assert target.graph.opset == 13
    assert target.graph.hard_swish != "keep"


TENSORRT = 'runtime = "tensorrt"'
NANO, ORIN_ANY, GPU = (f'{TENSORRT}\ndevice = "{name}"' for name in ("jetson-nano", "jetson-orin", "gpu"))


@pytest.mark.parametrize(
    ("text", "exc"),
    [
        (
            f'{NANO}\nprecisions = ["int8"]',
            "'precisions' asks for int8, which Jetson Nano cannot compute; it has fp32, fp16",
        ),
        (f'{ORIN_ANY}\nprecisions = ["fp8"]', "'precisions.0' is 'fp8', not one of fp32, fp16, int8"),
        (
            f'{TENSORRT}\ndevice = "jetson-orin-nano"\nprecisions = ["fp16"]\n[build]\ndla_core = 0',
            "'build.dla_core' = 0, but Jetson Orin Nano has 0 DLA cores",
        ),
        (
            f'{ORIN_ANY}\nprecisions = ["fp16"]\n[build]\ndla_core = 0',
            "not every module of 'jetson-orin' has DLA; name the module as 'device'",
        ),
        (
            f'{TENSORRT}\ndevice = "jetson-agx-orin"\nprecisions = ["fp16"]\n[build]\ndla_core = 1\n'
            "[graph]\ndynamic_batch = true",
            "'build.dla_core' needs a static batch",
        ),
        (
            f'{GPU}\nprecisions = ["int8"]\n[graph]\nint8 = "int8-cpu"',
            "'tensorrt' does not take 'graph.int8' = 'int8-cpu'; take 'int8-trt'",
        ),
        (
            f'{GPU}\n[graph]\nopset = 13\nhard_swish = "keep"',
            "'graph.hard_swish' = 'keep' needs opset 14, 'graph.opset' is 13",
        ),
        (f'{TENSORRT}\n[graph]\nopset = 17\nint8 = "int8-trt-fp16"', "needs opset 19, 'graph.opset' is 17"),
        (f'{GPU}\nversions = "10.3"', "'10.3' is no bound of versions"),
        (f'{TENSORRT}\ndevice = "jetson"', "'device' is 'jetson'; there are cpu, gpu, jetson-nano"),
        ('runtime = "tensorrt_rtx"\ndevice = "gpu"', "'build.compute_capabilities' is empty"),
        ('runtime = "onnxruntime"\nprecisions = ["fp32", "fp32"]', "each once"),
        ('runtime = "onnxruntime"\ndevice = ["cpu"]', "'device' is ['cpu']: input should be a valid string"),
        (TENSORRT, "'tensorrt' does not run on 'device' = 'cpu'; it runs on gpu and jetson"),
        ('runtime = "tensorrt_rtx"\ndevice = "jetson-orin"', "does not run on 'device' = 'jetson-orin'"),
        ('runtime = "onnxruntime"\ndevice = "gpu"', "does not run on 'device' = 'gpu'; it runs on cpu"),
        (f'{GPU}\nversions = ">=12,<11"', "holds no version"),
        (
            f'{NANO}\nversions = ">=8.2,<8.3"\n[graph]\nopset = 17',
            "'graph.opset' is 17, TensorRT 8.2 reads up to 13",
        ),
        (
            'runtime = "onnxruntime"\nprecisions = ["int8"]\n[graph]\nopset = 17\nint8 = "int8-trt"',
            "take 'int8-cpu'",
        ),
        ('runtime = "onnxruntime"\n[quantization]\nmethods = []', "'quantization.methods'"),
        ('runtime = "onnxruntime"\n[graph]\nopst = 18', "unknown key 'graph.opst' (did you mean 'opset'"),
        ('runtime = "onnxruntme"', "'runtime' is 'onnxruntme': did you mean 'onnxruntime'?"),
        (
            'runtime = "onnxruntime"\n[graph]\nbatch = 32\ndynamic_batch = true\nmax_batch = 8',
            "'graph.batch' 32 is above 'graph.max_batch' 8",
        ),
        ("[graph]\nopset = 9", "missing key 'runtime'; 'graph.opset' is 9"),
        ('alias = "jetson"', "is an alias of 'jetson', which is an alias itself"),
    ],
)
def test_target_that_cannot_be_served_is_refused(write, text, exc):
    with pytest.raises(TargetError, match=re.escape(exc)):
        read_target(write(text))


def test_dla_of_a_module_that_has_it_is_accepted(write):
    text = 'runtime = "tensorrt"\ndevice = "jetson-agx-orin"\nprecisions = ["fp16"]\n[build]\ndla_core = 1\n'
    assert read_target(write(text)).build.dla_core == 1
