"""The ONNX file itself: opset, batch, metadata, and nothing of the machine it was made on."""

from __future__ import annotations

import ast
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgecl.nets.model_dir import load_model


def shape_of(value):
    return [side.dim_value or side.dim_param for side in value.type.tensor_type.shape.dim]


def opset_of(model):
    return {entry.domain: entry.version for entry in model.opset_import}[""]


@pytest.fixture(scope="module")
def static(exported_bundle):
    return onnx.load(exported_bundle / "model.onnx")


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_file_has_the_targets_opset_and_standard_operators_and_passes_onnxs_check(static, dynamic_file):
    for model, opset in ((static, 15), (onnx.load(dynamic_file), 20)):
        assert opset_of(model) == opset
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert not model.functions


def test_input_and_output_are_one_each_by_name_with_a_static_batch(static):
    ((source,), (result,)) = static.graph.input, static.graph.output
    assert (source.name, shape_of(source)) == ("input", [1, 3, 32, 32])
    assert (result.name, shape_of(result)[0]) == ("output", 1)


def test_dynamic_batch_is_a_name_and_the_rest_is_constant(dynamic_file):
    shape = shape_of(onnx.load(dynamic_file).graph.input[0])
    assert isinstance(shape[0], str)
    assert shape[0]
    assert shape[1:] == [3, 32, 32]


@pytest.mark.parametrize("batch", [1, 2, 5, 6, 11])
def test_dynamic_batch_takes_any_and_computes_what_torch_computes(dynamic_file, carved_model, batch):
    net, _ = load_model(carved_model)
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = net(images).numpy()
    found = session(dynamic_file).run(None, {"input": images.numpy()})[0]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())


def test_metadata_is_json_by_key_and_pythons_literals_by_the_keys_of_others(dynamic_file):
    metadata = {entry.key: entry.value for entry in onnx.load(dynamic_file).metadata_props}
    ours = {key: json.loads(value) for key, value in metadata.items() if key.startswith("edgecl.")}
    assert ours == {"edgecl.classes": ["a", "b"], "edgecl.mean": [0.5, 0.25, 0.125]}
    assert metadata.pop("task") == "classify"
    assert {key: ast.literal_eval(value) for key, value in metadata.items() if key not in ours} == {
        "names": {0: "a", 1: "b"},
        "imgsz": [32, 32],
        "channels": 3,
        "stride": 1,
        "batch": 2,
    }


def test_file_says_that_edgecl_made_it(static):
    assert static.producer_name == "edgecl"
    assert static.producer_version


def test_file_holds_no_path_of_this_machine(exported_bundle, dynamic_file):
    for path in (exported_bundle / "model.onnx", dynamic_file):
        content = path.read_bytes()
        for trace in (b"/work", b"site-packages", b".py", b"/home", b"/tmp", b"/root", b"stack_trace"):
            assert trace not in content
