"""A real bundle of a tiny net, made without torch: Conv, Relu, GlobalAveragePool, Flatten."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgecl.onboard.bundle import digest_of_record, sha256_of_file

SIDE, FEATURES = 8, 6


def expected_outputs(images: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The same net in NumPy, in float64."""
    patches = np.lib.stride_tricks.sliding_window_view(images.astype(np.float64), (3, 3), axis=(2, 3))
    maps = np.einsum("nchwij,ocij->nohw", patches, weight.astype(np.float64)) + bias[None, :, None, None]
    return np.maximum(maps, 0).mean(axis=(2, 3)).astype(np.float32)


def make_bundle(
    path: Path, *, batch: int = 1, dynamic: bool = False, images: int = 5, shift: float = 0.0
) -> Path:
    """Write a bundle; `shift` is added to the first reference output, so that the net disagrees with it."""
    path.mkdir(parents=True)
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(FEATURES, 3, 3, 3)).astype(np.float32)
    bias = draw.normal(size=FEATURES).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "weight", "bias"], ["maps"]),
            helper.make_node("Relu", ["maps"], ["active"]),
            helper.make_node("GlobalAveragePool", ["active"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["output"]),
        ],
        "tiny",
        [
            helper.make_tensor_value_info(
                "input", TensorProto.FLOAT, ["N" if dynamic else batch, 3, SIDE, SIDE]
            )
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N" if dynamic else batch, FEATURES])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.save(model, path / "model.onnx")
    inputs = draw.normal(size=(images, 3, SIDE, SIDE)).astype(np.float32)
    outputs = expected_outputs(inputs, weight, bias)
    outputs[0, 0] += shift
    np.savez(path / "reference.npz", inputs=inputs, outputs=outputs)
    manifest = {
        "schema": 1,
        "kind": "bundle",
        "made_by": "edgecl test",
        "made_from": None,
        "command": "python",
        "target_name": "ort-cpu",
        "runtime": "onnxruntime",
        "precision": "fp32",
        "model": "model.onnx",
        "input": {
            "name": "input",
            "shape": [batch, 3, SIDE, SIDE],
            "dtype": "float32",
            "dynamic_batch": dynamic,
            "max_batch": 2 if dynamic else batch,
        },
        "output": {"name": "output", "shape": [batch, FEATURES]},
        "tolerance": {"max_relative_difference": 1e-3, "top1_agreement": 0.99},
        "files": {name: sha256_of_file(path / name) for name in ("model.onnx", "reference.npz")},
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
