from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from edgecl.onboard.errors import DeviceError
from edgecl.onboard.layers import (
    check_delivered,
    count_precisions,
    is_matrix_layer,
    layers_of_engine,
    layers_of_log,
    precision_of,
    precision_of_layer,
    precision_shares,
)

# In the form of TensorRT 8, whose inspector writes formats in words, as its documentation shows it.
INT8_FORMAT = "Thirty-two wide channel vectorized row major Int8 format."
INT8_CONVOLUTION = {
    "Name": "conv_a + relu_a",
    "LayerType": "CaskConvolution",
    "Inputs": [{"Name": "x", "Dimensions": [16, 512, 28, 28], "Format/Datatype": INT8_FORMAT}],
    "Outputs": [{"Name": "y", "Format/Datatype": INT8_FORMAT}],
    "Weights": {"Type": "Int8", "Count": 131072},
    "Bias": {"Type": "Float", "Count": 256},
}
REFORMAT = {
    "Name": "Reformatting CopyNode for Input Tensor 0 to conv_a",
    "LayerType": "Reformat",
    "Inputs": [{"Name": "x", "Location": "Device", "Format/Datatype": "Row major linear FP16 format"}],
    "Outputs": [{"Name": "x2", "Format/Datatype": "Channel major FP16 format where channel % 4 == 0"}],
}

# One message of the verbose log of TensorRT for RTX 1.7, shortened: what it makes of an fp16 and of an int8 net.
LOG = """\
Layers:
Name: __myl_CastConc_myl0_0, LayerType: kgen, Inputs: [ { Name: input, Dimensions: [1,3,64,64], Datatype: Float, \
Format: (Linear) Row major linear format }], Constants: [ { Name: c, Dimensions: [1,61,64,64], Datatype: Half, \
Format: (NHWC) Channel major format }], Outputs: [ { Name: x, Dimensions: [1,64,64,64], Datatype: Half, Format: \
(NHWC) Channel major format }], TacticName: __myl_CastConc_0xb1, StreamId: 0, Metadata:
Name: __myl_CorrMulAddMinMaxMul_myl0_1, LayerType: runtime_fusion, Inputs: [ { Name: x, Datatype: Half, Format: \
(NHWC) Channel major format }], Constants: [ { Name: w, Datatype: Half }], Outputs: [ { Name: y, Datatype: Half }], \
TacticName: , StreamId: 0, Metadata: [ONNX Layer: node_Conv_507]
Name: node_Conv_510_myl0_2, LayerType: correlation, Inputs: [ { Name: y, Datatype: Int8, Format: (NHWC) Channel }], \
Constants: [ { Name: w, Datatype: Int8 }, { Name: b, Datatype: Float }], Outputs: [ { Name: z, Datatype: Float }], \
TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: node_Conv_510]

I/O Tensors:
 Name: input, IOMode: Input, DataType: Float"""


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("Int8", "int8"),
        ("BFloat16", "bf16"),
        ("Row major linear FP16 format", "fp16"),
        ("Four wide channel vectorized row major Int8 format", "int8"),
        ("Half(64,1:8,64,64)", "fp16"),
        ("Int32", None),
        ("N/A due to dynamic shapes", None),
        ("", None),
    ],
)
def test_precision_of_a_type_or_format(text, precision):
    assert precision_of(text) == precision


HIDDEN = [{"Format/Datatype": "N/A due to dynamic shapes"}]


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        ({"Inputs": HIDDEN, "Outputs": HIDDEN, "Weights": {"Type": "Half"}}, "fp16"),
        # One that quantizes its output does not compute in int8; int8 inputs mean int8 whatever the output.
        ({"Inputs": [{"Datatype": "Half"}], "Outputs": [{"Datatype": "Int8"}]}, "fp16"),
        ({"Inputs": [{"Datatype": "Int8"}], "Outputs": [{"Datatype": "Float"}]}, "int8"),
    ],
)
def test_precision_of_a_layer(layer, precision):
    assert precision_of_layer({"LayerType": "kgen", **layer}) == precision


def test_moving_layers_do_not_count():
    assert count_precisions([INT8_CONVOLUTION, REFORMAT]) == {"int8": 1}
    assert precision_shares([INT8_CONVOLUTION, REFORMAT]) == {"int8": 1.0}


@pytest.mark.parametrize(
    ("kind", "name", "matrix"),
    [
        ("correlation", "a", True),
        ("gemm", "a", True),
        ("CONVOLUTION", "a", True),
        ("CaskGemmMatrixMultiply", "a", True),
        ("runtime_fusion", "__myl_CorrMulAdd_myl0_1", True),
        ("kgen", "__myl_MulAddMinMaxMul_myl0_6", False),
        ("kgen", "__myl_CastConc_myl0_0", False),
        ("Reformat", "Reformatting CopyNode for conv_a", False),
        ("PointWise", "PWN(conv_gate)", False),
    ],
)
def test_convolutions_and_matrix_products_are_recognized(kind, name, matrix):
    assert is_matrix_layer({"Name": name, "LayerType": kind}) == matrix


def test_log_of_a_builder_lists_the_layers():
    layers = layers_of_log(["something else", LOG])
    assert [precision_of_layer(layer) for layer in layers] == ["fp32", "fp16", "int8"]
    assert precision_shares(layers) == {"fp16": 0.5, "int8": 0.5}


# --- the inspector ---


def engine_that_says(whole, *single):
    inspector = SimpleNamespace(
        get_engine_information=lambda form: whole, get_layer_information=lambda index, form: single[index]
    )
    return SimpleNamespace(create_engine_inspector=lambda: inspector, num_layers=len(single))


TRT = SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON="json"))


def test_inspector_with_details():
    text = json.dumps({"Layers": [INT8_CONVOLUTION, REFORMAT], "Bindings": ["x", "y"]})
    assert layers_of_engine(TRT, engine_that_says(text)) == [INT8_CONVOLUTION, REFORMAT]


def test_inspector_with_names_only_says_no_precision():
    layers = layers_of_engine(TRT, engine_that_says('{"Layers": ["conv_a + relu_a", "fc"], "Bindings": []}'))
    assert count_precisions(layers) == {"unknown": 2}
    assert precision_shares(layers) == {}
    assert check_delivered({}, "fp16") is False


def test_invalid_json_of_the_whole_engine_is_read_layer_by_layer():
    broken = '{"Layers": [{"Name": "a "quoted" name"}]}'
    layers = layers_of_engine(
        TRT, engine_that_says(broken, json.dumps(INT8_CONVOLUTION), '{"Name": "a "b""}')
    )
    assert count_precisions(layers) == {"int8": 1, "unknown": 1}


# --- delivered or not ---


@pytest.mark.parametrize(
    ("shares", "asked", "expected", "delivered"),
    [
        ({"fp16": 0.97, "fp32": 0.03}, "fp16", 1.0, True),
        ({"fp16": 0.25, "fp32": 0.75}, "fp16", 1.0, True),
        ({"fp16": 0.24, "fp32": 0.76}, "fp16", 1.0, False),
        ({"fp32": 1.0}, "fp16", 1.0, False),
        ({"int8": 0.3, "fp16": 0.7}, "int8", 0.4, True),
        ({"int8": 0.09, "fp16": 0.91}, "int8", 0.4, False),
        ({"fp16": 1.0}, "int8", 0.4, False),
        ({"fp32": 1.0}, "fp32", 1.0, True),
        ({"fp16": 1.0}, "fp32", 1.0, True),
    ],
)
def test_a_quarter_of_what_the_graph_asks_for_is_delivered(shares, asked, expected, delivered):
    refused = pytest.raises(DeviceError, match=f"asked for {asked} and not delivered")
    with nullcontext() if delivered else refused:
        assert check_delivered(shares, asked, expected=expected) is True


def test_not_delivered_says_what_was():
    words = r"int8 .*not delivered: TensorRT 10\.3\.0 .* 5 % .* 40 % \(fp16 95 %, int8 5 %\)"
    with pytest.raises(DeviceError, match=words) as caught:
        check_delivered({"fp16": 0.95, "int8": 0.05}, "int8", expected=0.4, maker="TensorRT 10.3.0")
    assert "such as fp16" in caught.value.hint
