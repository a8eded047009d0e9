"""A real bundle of a tiny net, made without torch: Conv, Relu, GlobalAveragePool, Flatten."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgecl.onboard.bundle import SCHEMA, digest_of_record, onnx_name, sha256_of_file

SIDE, FEATURES = 8, 6
TOLERANCES = {
    "fp32": {"max_relative_difference": 1e-3, "top1_agreement": 0.99},
    "fp16": {"max_relative_difference": 2e-2, "top1_agreement": 0.97},
    "int8": {"max_relative_difference": 0.5, "top1_agreement": 0.8},
}
FORMS = {"fp32": "fp32", "fp16": "fp16", "int8": "int8-cpu"}


def expected_outputs(images: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The same net in NumPy, in float64."""
    patches = np.lib.stride_tricks.sliding_window_view(images.astype(np.float64), (3, 3), axis=(2, 3))
    maps = np.einsum("nchwij,ocij->nohw", patches, weight.astype(np.float64)) + bias[None, :, None, None]
    return np.maximum(maps, 0).mean(axis=(2, 3)).astype(np.float32)


def rounded(weight: np.ndarray, precision: str) -> np.ndarray:
    """A weight as a precision can hold it, in float32: every file of the bundle computes something else."""
    if precision == "fp16":
        return weight.astype(np.float16).astype(np.float32)
    if precision == "int8":
        scale = np.abs(weight).max() / 127
        return (np.round(weight / scale) * scale).astype(np.float32)
    return weight


def tiny_net(weight: np.ndarray, bias: np.ndarray, *, batch: int | str) -> onnx.ModelProto:
    """The net as ONNX, opset 13."""
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "weight", "bias"], ["maps"]),
            helper.make_node("Relu", ["maps"], ["active"]),
            helper.make_node("GlobalAveragePool", ["active"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["output"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, FEATURES])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)


def make_bundle(
    path: Path,
    *,
    batch: int = 1,
    dynamic: bool = False,
    images: int = 5,
    shift: float = 0.0,
    precisions: Sequence[str] = ("fp32",),
    runtime: str = "onnxruntime",
    target_name: str = "ort-cpu",
) -> Path:
    """Write a bundle.

    A dynamic batch is any up to 2. `shift` is added to the first reference output, so that the net disagrees with it.
    The precisions, the default one first, are all float32 nets of nearly the same weights.
    """
    path.mkdir(parents=True)
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(FEATURES, 3, 3, 3)).astype(np.float32)
    bias = draw.normal(size=FEATURES).astype(np.float32)
    for precision in precisions:
        net = tiny_net(rounded(weight, precision), bias, batch="N" if dynamic else batch)
        onnx.save(net, path / onnx_name(precision))
    inputs = draw.normal(size=(images, 3, SIDE, SIDE)).astype(np.float32)
    outputs = expected_outputs(inputs, weight, bias)
    outputs[0, 0] += shift
    np.savez(path / "reference.npz", inputs=inputs, outputs=outputs)
    names = [onnx_name(precision) for precision in precisions] + ["reference.npz"]
    untold = {"opset": 13, "decision": None, "accuracy": None}
    manifest = {
        "schema": SCHEMA,
        "kind": "bundle",
        "made_by": "edgecl test",
        "made_from": None,
        "command": "python",
        "target_name": target_name,
        "target": {"runtime": runtime, "versions": "", "device": "cpu", "precisions": list(precisions)},
        "runtime": runtime,
        "precision": precisions[0],
        "precisions": {
            name: {"model": onnx_name(name), "form": FORMS[name], "tolerance": TOLERANCES[name], **untold}
            for name in precisions
        },
        "input": {
            "name": "input",
            "shape": [batch, 3, SIDE, SIDE],
            "dtype": "float32",
            "dynamic_batch": dynamic,
            "max_batch": 2 if dynamic else batch,
        },
        "output": {"name": "output", "shape": [batch, FEATURES]},
        "files": {name: sha256_of_file(path / name) for name in names},
        "size_bytes": {name: (path / name).stat().st_size for name in names},
    }
    write_manifest(path, manifest)
    return path


def read_manifest(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return manifest


def write_manifest(bundle: Path, manifest: dict[str, Any]) -> None:
    sealed = {**manifest, "sha256": digest_of_record(manifest)}
    (bundle / "manifest.json").write_text(json.dumps(sealed))


def flip_byte(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
