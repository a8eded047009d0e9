"""The tiny net in the forms that TensorRT takes, a bundle of them, and a fake GPU to run it on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecl.config.target import Graph
from edgecl.deploy.ends import with_ends
from edgecl.onboard import cudart
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.records import Preprocessing
from onboard.fake_cudart import FakeCudart
from onboard.fake_tensorrt import FakeTensorrt
from onboard.tiny_bundle import FEATURES, SIDE, make_bundle, read_manifest, write_manifest

FORMS = {"fp32": "fp32", "fp16": "fp16", "int8": "int8-trt"}
OPSET = 19
RAW = Graph(opset=OPSET, input="uint8")
PIXELS = Preprocessing(image_size=SIDE, resize_size=SIDE, mean=[0.5] * 3, std=[0.25] * 3)


def weights() -> tuple[np.ndarray, np.ndarray]:
    """The weight and bias of make_bundle."""
    draw = np.random.default_rng(0)
    return draw.normal(size=(FEATURES, 3, 3, 3)).astype("f4"), draw.normal(size=FEATURES).astype("f4")


def net(form: str, *, batch: int | str) -> onnx.ModelProto:
    """The tiny net as 'fp32', as 'fp16' between two Casts, or as 'int8-trt' or 'int8-trt-fp16' with Q/DQ."""
    weight, bias = weights()
    node = helper.make_node
    half = form in ("fp16", "int8-trt-fp16")
    kind = np.float16 if half else np.float32
    nodes, values = [], {"bias": bias.astype(kind)}
    tensor = "input"
    if half:
        nodes.append(node("Cast", [tensor], ["input_half"], to=TensorProto.FLOAT16))
        tensor = "input_half"
    filters = "weight"
    values["weight"] = weight.astype(kind)
    if form.startswith("int8"):
        values.update(
            input_scale=np.array(4 / 127, kind),
            weight_scale=np.array(np.abs(weight).max() / 127, kind),
            zero=np.array(0, np.int8),
        )
        for name, scale in ((tensor, "input_scale"), (filters, "weight_scale")):
            nodes.append(node("QuantizeLinear", [name, scale, "zero"], [name + "_q"]))
            nodes.append(node("DequantizeLinear", [name + "_q", scale, "zero"], [name + "_dq"]))
        tensor, filters = tensor + "_dq", filters + "_dq"
    nodes += [
        node("Conv", [tensor, filters, "bias"], ["maps"], name="conv"),
        node("Relu", ["maps"], ["active"]),
        node("GlobalAveragePool", ["active"], ["pooled"]),
        node("Flatten", ["pooled"], ["flat" if half else "output"]),
    ]
    if half:
        nodes.append(node("Cast", ["flat"], ["output"], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, FEATURES])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


def make_engine_bundle(path: Path, *, int8: str = "int8-trt", **options: Any) -> Path:
    """Write a bundle of the tiny net for TensorRT in every precision.

    `options` are those of make_bundle, build, and raw: its nets then take bytes, channels last.
    """
    raw = options.pop("raw", False)
    build = options.pop("build", {"workspace_mib": 256, "optimization_level": 5, "tf32": False})
    make_bundle(
        path, precisions=("fp16", "fp32", "int8"), runtime="tensorrt", target_name="jetson", **options
    )
    manifest = read_manifest(path)
    manifest["target"]["build"] = build
    for precision, about in manifest["precisions"].items():
        about["form"] = int8 if precision == "int8" else FORMS[precision]
        batch = "N" if manifest["input"]["dynamic_batch"] else manifest["input"]["shape"][0]
        model = net(about["form"], batch=batch)
        onnx.save(with_ends(model, graph=RAW, preprocessing=PIXELS) if raw else model, path / about["model"])
        manifest["files"][about["model"]] = sha256_of_file(path / about["model"])
    if raw:
        side = manifest["input"]["shape"][2]
        manifest["input"].update(
            shape=[manifest["input"]["shape"][0], side, side, 3], dtype="uint8", layout="nhwc"
        )
    write_manifest(path, manifest)
    return path


def install(
    monkeypatch: pytest.MonkeyPatch, version: str, *, cuda: FakeCudart | None = None
) -> tuple[FakeTensorrt, FakeCudart]:
    """Put a fake TensorRT and CUDA runtime where the device code looks for them."""
    cuda = cuda or FakeCudart(version=10020 if version.startswith("8.2") else 12060)
    monkeypatch.setattr(cudart, "open_libraries", lambda: iter([("libcudart.so", cuda)]))
    fake = FakeTensorrt(version, cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake, cuda
