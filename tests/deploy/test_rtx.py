"""TensorRT for RTX, really: it parses and compiles without a GPU; what it cannot do here is run an engine."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import timm
import torch
from every_net import FAMILIES
from torch import nn

from edgecl.config.target import Build, Graph, read_target
from edgecl.deploy.calibrate import calibrate
from edgecl.deploy.ends import with_ends
from edgecl.deploy.fp16 import half
from edgecl.deploy.int8 import quantize
from edgecl.deploy.onnx import onnx_from_net
from edgecl.deploy.rtx import compile_rtx
from edgecl.errors import DeviceError
from edgecl.nets.backbone import example_side
from edgecl.nets.catalogue import NETS
from edgecl.nets.folding import fuse_branches
from edgecl.onboard.cudart import Gpu
from edgecl.onboard.errors import DeviceError as OnboardDeviceError
from edgecl.onboard.tensorrt_session import TensorrtSession
from edgecl.storage.records import Preprocessing

SIDE = 64
BUILD = Build(compute_capabilities=("SM86", "SM89", "SM120"))
INPUT = {"name": "input", "shape": [1, 3, SIDE, SIDE], "dynamic_batch": False, "max_batch": 1}
# It has depthwise convolutions, squeeze-and-excitation, hard-swish and sums. Torch's exporter takes long for each net.
QUICK = "mobilenetv3_small_100"
FORMS = {"fp32": "fp32", "fp16": "fp16", "int8-trt": "int8", "int8-trt-fp16": "int8"}
CASES = [
    pytest.param(
        name,
        form,
        marks=[] if name == QUICK or (name in FAMILIES and form == "int8-trt") else pytest.mark.slow,
    )
    for name in NETS
    for form in FORMS
]


@pytest.fixture(scope="module", autouse=True)
def _rtx():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install tensorrt-rtx")


@pytest.fixture(scope="module")
def made():
    """Each net in every form, made once: name -> (torch net, form -> model)."""
    kept = {}

    def make(name):
        if name not in kept:
            torch.manual_seed(0)
            net = timm.create_model(name, num_classes=10).eval()
            side = example_side(net)
            fp32 = onnx_from_net(
                net, graph=Graph(opset=19, hard_swish="hard_sigmoid"), shape=(3, side, side), metadata={}
            )
            images = np.random.default_rng(0).normal(size=(4, 3, side, side)).astype(np.float32)
            ranges = calibrate(fp32, images, ["minmax"])["minmax"]
            kept[name] = net, {
                "fp32": fp32,
                "fp16": half(fp32, images=images)[0],
                **{form: quantize(fp32, form=form, ranges=ranges, images=images) for form in ("int8-trt", "int8-trt-fp16")},
            }  # fmt: skip
        return kept[name]

    return make


def compile_file(tmp_path, *, form="fp32", build=BUILD, input_form=INPUT):
    file, plan = tmp_path / "model.onnx", tmp_path / "engine.plan"
    precision = form.partition("-")[0]
    return compile_rtx(file, plan, precision=precision, form=form, build=build, input_form=input_form)


def compile_(model, tmp_path, *, input_form=None, **options):
    onnx.save(model, tmp_path / "model.onnx")
    shape = [dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim]
    return compile_file(tmp_path, input_form=input_form or {**INPUT, "shape": shape}, **options)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_net_compiles_in_every_form(made, tmp_path, name, form):
    net, models = made(name)
    record = compile_(models[form], tmp_path, form=form)
    operators = Counter(node.op_type for node in models[form].graph.node)
    layers = record["layers"]
    # Counted in the torch net: nothing is lost on the way. A head of its own kind may end in two linear layers.
    parts = list(fuse_branches(net).modules())
    heads = [part for part in parts if hasattr(part, "qkv")]
    assert layers["CONVOLUTION"] == sum(isinstance(part, nn.Conv2d) for part in parts)
    products = operators["Gemm"] + operators["MatMul"]
    assert layers["MATRIX_MULTIPLY"] == products >= sum(isinstance(part, nn.Linear) for part in parts)
    assert products >= 1 + 2 * len(heads)
    assert layers.get("QUANTIZE", 0) == operators["QuantizeLinear"]
    assert layers.get("DEQUANTIZE", 0) == operators["DequantizeLinear"]
    # The parser casts the whole numbers that reshape and gather heads of attention.
    casts = layers.get("CAST", 0) if {"Gather", "Reshape", "Slice"} & set(operators) else operators["Cast"]
    assert layers.get("CAST", 0) == casts
    if form == "fp32":
        assert operators["QuantizeLinear"] == operators["Cast"] == 0
    elif form == "fp16":
        # More where an operator has no float16 form, as layer norms and Resize: it stays in float32.
        assert operators["Cast"] >= 2
    else:
        assert layers["QUANTIZE"] > max(layers["CONVOLUTION"], 4 * len(heads))
    assert record["io"] == {"input": "FLOAT", "output": "FLOAT"}
    assert record["size_bytes"] == (tmp_path / "engine.plan").stat().st_size > 100_000
    allowed = "Converting conv" if form == "int8-trt-fp16" else "nothing"
    assert not [warning for warning in record["warnings"] if allowed not in warning]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["uint8", "uint8-nchw"])
def test_bytes_in_and_probabilities_out_compile(made, tmp_path, form, kind):
    _, models = made(QUICK)
    about = Preprocessing(image_size=SIDE, resize_size=SIDE, mean=[0.485] * 3, std=[0.229] * 3)
    model = with_ends(models[form], graph=Graph(opset=19, input=kind, softmax=True), preprocessing=about)
    sides = [SIDE, SIDE, 3] if kind == "uint8" else [3, SIDE, SIDE]
    record = compile_(
        model, tmp_path, form=form, input_form={**INPUT, "shape": [1, *sides], "dtype": "uint8"}
    )
    assert record["io"] == {"input": "UINT8", "output": "FLOAT"}
    assert record["layers"]["SOFTMAX"] == 1


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8-trt"])
def test_compiled_layers_are_in_the_precision_asked_for(made, tmp_path, form):
    _, models = made(QUICK)
    nodes = models[form].graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    matrices = [node for node in nodes if node.op_type in ("Conv", "Gemm")]
    # What is left in fp32 on purpose is counted in the file.
    expected = (
        sum(node.input[0] in dequantized for node in matrices) / len(matrices) if form == "int8-trt" else 1.0
    )
    assert expected > 0.5
    found = compile_(models[form], tmp_path, form=form)["engine"]["shares"][FORMS[form]]
    assert found == pytest.approx(expected, abs=0.05)


def test_fp16_between_int8_layers_is_not_fp32(made, tmp_path):
    _, models = made(QUICK)
    counts = {
        form: compile_(models[form], tmp_path, form=form)["engine"]["layers"]
        for form in ("int8-trt", "int8-trt-fp16")
    }
    assert counts["int8-trt"].get("fp16", 0) == 0
    assert counts["int8-trt-fp16"]["fp16"] > 10
    assert counts["int8-trt-fp16"].get("fp32", 0) < counts["int8-trt"]["fp32"] / 2


def test_one_plan_holds_every_capability_that_the_target_names(made, tmp_path):
    _, models = made(QUICK)
    build = read_target("rtx").build
    record = compile_(models["fp16"], tmp_path, form="fp16", build=build)
    assert record["compute_capabilities"] == list(build.compute_capabilities)
    assert record["settings"]["strongly_typed"] is True
    assert record["version"].count(".") >= 2


def test_dynamic_batch_compiles(tmp_path):
    graph = Graph(opset=19, batch=2, dynamic_batch=True, max_batch=8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model = onnx_from_net(net, graph=graph, shape=(3, SIDE, SIDE), metadata={})
    form = {**INPUT, "shape": [2, 3, SIDE, SIDE], "dynamic_batch": True, "max_batch": 8}
    assert compile_(model, tmp_path, form="fp32", input_form=form)["layers"]["CONVOLUTION"] == 1


@pytest.mark.parametrize("form", ["fp16", "int8-trt"])
def test_a_graph_in_another_precision_is_refused(made, tmp_path, form):
    _, models = made(QUICK)
    words = rf"asked for {FORMS[form]} .*not delivered.*'model\.onnx' is {FORMS[form]} \(fp32 100 %\)"
    with pytest.raises(DeviceError, match=words):
        compile_(models["fp32"], tmp_path, form=form)
    assert not (tmp_path / "engine.plan").exists()


@pytest.mark.parametrize("content", [b"", b"\x08" * 100, b"not an ONNX file"])
def test_a_file_that_is_no_net_is_refused(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(DeviceError, match=r"'model\.onnx'"):
        compile_file(tmp_path)
    assert not (tmp_path / "engine.plan").exists()


def test_a_capability_that_it_does_not_know_is_named(made, tmp_path):
    _, models = made(QUICK)
    build = Build.model_construct(**{**BUILD.model_dump(), "compute_capabilities": ("SM86", "SM87")})
    with pytest.raises(DeviceError, match=r"for SM87;.*knows SM\d+, ") as caught:
        compile_(models["fp32"], tmp_path, form="fp32", build=build)
    assert "[build] compute_capabilities" in caught.value.hint


def test_the_form_for_processors_is_refused(tmp_path):
    with pytest.raises(DeviceError, match="takes no graph of the form 'int8-cpu'"):
        compile_file(tmp_path, form="int8-cpu")


def test_a_real_engine_does_not_load_without_a_gpu_and_says_why(monkeypatch, made, tmp_path):
    """The session on the real library, as far as it gets here; with a GPU this test has nothing to show."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    from edgecl.onboard import cudart

    _, models = made(QUICK)
    record = compile_(models["fp16"], tmp_path, form="fp16")
    monkeypatch.setattr(cudart.Cudart, "__init__", lambda self: None)
    monkeypatch.setattr(cudart.Cudart, "gpu", lambda self: Gpu("RTX 4060", "8.9", 24, False))
    about = {"model": "model.onnx", "form": "fp16", "tolerance": {}, "engines": {"engine.plan": record}}
    manifest = {
        "precision": "fp16",
        "precisions": {"fp16": about},
        "input": INPUT,
        "output": {"name": "output", "shape": [1, 10]},
    }
    with pytest.raises(OnboardDeviceError, match=r"cannot load 'engine\.plan': .*cudaError 35"):
        TensorrtSession(tmp_path, manifest, precision="fp16", threads=1, runtime="tensorrt_rtx")
