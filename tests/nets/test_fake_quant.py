"""Fake quantization: the grid, its gradients, where it sits in a net, and the Q/DQ graph it exports to."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from torch import nn

from edgecl.config.target import Graph
from edgecl.deploy.onnx import onnx_from_net
from edgecl.errors import NonFiniteError, RecipeError
from edgecl.nets.backbone import create_backbone, is_norm, recalibrate
from edgecl.nets.fake_quant import (
    FakeQuant,
    QuantConv2d,
    QuantLinear,
    learning_scales,
    quantize_net,
    scale_of_least_error,
    without_fake_quant,
)
from edgecl.nets.folding import fold_batch_norm


def pictures(count, *, side=64):
    """Soft-edged noise: as pictures are, similar from pixel to pixel."""
    noise = torch.randn(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(5))
    return nn.functional.interpolate(noise, size=(side, side), mode="bilinear")


def real_net(arch):
    """A net with random weights whose norms know the pictures, so that every layer says something."""
    torch.manual_seed(0)
    net = create_backbone(arch, num_classes=5).eval()
    with torch.no_grad():
        for module in net.modules():
            # timm starts the last norm of a ResNet's block at zero.
            if is_norm(module):
                module.weight.uniform_(0.5, 1.5)
    recalibrate(net, [pictures(16)], device=torch.device("cpu"))
    return net


def quantizer(scale):
    module = FakeQuant(None if isinstance(scale, float) else len(scale))
    module.scale = torch.tensor(scale)
    return module


# --- the grid ---


def test_one_scale_rounds_to_127_steps_up_and_128_down():
    values = torch.tensor([-90.0, -64.0, -63.9, -0.25, 0.24, 0.26, 0.75, 63.5, 63.6, 1e9])
    expected = [-64, -64, -64, 0, 0, 0.5, 1.0, 63.5, 63.5, 63.5]
    assert quantizer(0.5)(values).tolist() == expected


@pytest.mark.parametrize("shape", [(3, 2, 5, 5), (3, 4)], ids=["convolution", "linear"])
def test_scales_per_channel_belong_to_the_first_dimension(shape):
    random = np.random.default_rng(0)
    values = random.normal(0, 1, shape).astype(np.float32)
    scales = np.array([0.5, 0.01, 0.003], np.float32)
    steps = scales.reshape(3, *[1] * (len(shape) - 1))
    expected = np.clip(np.rint(values / steps), -128, 127) * steps
    np.testing.assert_allclose(
        quantizer(scales.tolist())(torch.from_numpy(values)).numpy(), expected, rtol=1e-6
    )


# --- gradients ---


def lsq(values, scale, gradient):
    """Equations 1 to 3 and 5 of arXiv:1902.08153 in float64, as printed: v, s, Q_N = 128, Q_P = 127."""
    ratio = values / scale
    low, high = ratio <= -128, ratio >= 127
    by_scale = np.where(low, -128, np.where(high, 127, -ratio + np.rint(ratio)))
    return gradient * ~(low | high), gradient * by_scale


@pytest.mark.parametrize("scales", [0.02, [0.02, 0.3, 0.004]], ids=["per tensor", "per channel"])
def test_gradients_are_those_of_the_paper(scales):
    random = np.random.default_rng(1)
    values = random.normal(0, 1.5, (3, 4, 5, 5)).astype(np.float32)
    gradient = random.normal(0, 1, values.shape).astype(np.float32)
    scale = np.asarray(scales, np.float64).reshape(-1, 1, 1, 1)
    through, by_scale = lsq(values.astype(np.float64), scale, gradient.astype(np.float64))
    by_scale = by_scale.sum((1, 2, 3)) if isinstance(scales, list) else by_scale.sum()
    module = quantizer(scales)
    given = torch.from_numpy(values).requires_grad_()
    with learning_scales(module):
        module(given).backward(torch.from_numpy(gradient))
        found = module.log_scale.grad.numpy()
    assert (np.abs(through) == 0).any()
    assert (np.abs(through) > 0).any()
    np.testing.assert_allclose(given.grad.numpy(), through, rtol=1e-6)
    # The parameter is the logarithm: d/d(log s) = s d/ds.
    np.testing.assert_allclose(found, by_scale * np.asarray(scales), rtol=1e-4)


@pytest.mark.parametrize("arch", ["mobilenetv3_small_100", "resnet18"])
def test_every_weight_and_every_scale_of_a_net_gets_a_gradient(arch):
    net, _ = quantize_net(real_net(arch), pictures(4))
    with learning_scales(net):
        nn.functional.cross_entropy(net.train()(pictures(4)), torch.arange(4)).backward()
        flat = [name for name, each in net.named_parameters() if each.grad is None or not each.grad.any()]
        scales = [name for name, _ in net.named_parameters() if name.endswith("log_scale")]
    assert len(scales) == sum(isinstance(module, FakeQuant) for module in net.modules())
    assert flat == []


def test_scales_are_parameters_only_while_they_are_learnt():
    module = quantizer([0.5, 0.25])
    assert list(module.parameters()) == []
    with learning_scales(module):
        assert len(list(module.parameters())) == 1
        with torch.no_grad():
            module.log_scale.add_(math.log(2))
    assert list(module.parameters()) == []
    torch.testing.assert_close(module.scale, torch.tensor([1.0, 0.5]))
    assert list(module.state_dict()) == ["scale"]


# --- calibration ---


@pytest.mark.parametrize(
    ("values", "fraction"),
    [
        (np.linspace(0, 1, 100_000), 1.0),
        (np.concatenate([np.abs(np.random.default_rng(0).normal(0, 0.01, 100_000)), [1.0]]), None),
    ],
    ids=["even", "one far away"],
)
def test_scale_of_least_error_is_that_of_trying_all(values, fraction):
    counts, _ = np.histogram(values, bins=2048, range=(0, 1))
    found = float(scale_of_least_error(torch.from_numpy(counts).float(), torch.tensor(1.0)))
    tried = np.linspace(0.05, 1, 400) / 127
    errors = [np.square(np.clip(np.rint(values / step), 0, 127) * step - values).sum() for step in tried]
    mine = np.square(np.clip(np.rint(values / found), 0, 127) * found - values).sum()
    assert mine < 1.05 * min(errors)
    if fraction:
        assert found == pytest.approx(fraction / 127)
    else:
        assert found < 0.7 / 127


def test_every_scale_is_calibrated_to_what_passes_there():
    net, _ = quantize_net(real_net("mobilenetv3_small_100"), pictures(16))
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output: seen.update({module: inputs[0].abs().max()})
        )
        for module in net.modules()
        if isinstance(module, FakeQuant)
    ]
    with torch.no_grad():
        without_fake_quant(net)(pictures(16))
        net(pictures(16))
    assert len(seen) == len(handles)
    for module, peak in seen.items():
        full = peak / 127
        if module.scale.ndim:
            assert float(module.scale.max()) == pytest.approx(float(full), rel=1e-6)
        else:
            # The rounding of the layers before moves the peak a little.
            assert 0.09 * full < module.scale < 1.3 * full


def test_dead_tensor_and_dead_channel_keep_a_scale_that_divides():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        net[0].weight[1] = 0
        net[0].bias.fill_(-1000)
    quantized, _ = quantize_net(net, pictures(2), keep=[])
    assert float(quantized[2].input_quantizer.scale) == 1
    assert float(quantized[0].weight_quantizer.scale[1]) == 1
    with torch.no_grad():
        assert torch.isfinite(quantized(pictures(2))).all()


def test_value_that_is_no_number_is_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    images = pictures(2)
    images[1, 0, 3, 3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"'0\.input_quantizer' .*inf .*calibrating"):
        quantize_net(net, images, keep=[])


# --- where quantizers sit ---


@pytest.fixture(scope="module")
def small():
    """MobileNetV3-Small, its quantized form, and what was kept."""
    net = real_net("mobilenetv3_small_100")
    return net, *quantize_net(net, pictures(16))


def test_first_convolution_gates_and_classifier_stay_float(small):
    net, quantized, kept = small
    gates = [name for name, module in net.named_modules() if isinstance(module, SqueezeExcite)]
    assert len(gates) == 9
    assert kept == sorted(["conv_stem", "classifier", *gates])
    for name, module in quantized.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            held = any(name == each or name.startswith(f"{each}.") for each in kept)
            assert isinstance(module, (QuantConv2d, QuantLinear)) != held, name


def test_residual_block_shares_one_quantizer_between_skip_and_convolution(small):
    _, quantized, _ = small
    block = quantized.blocks[1][1]
    assert block.has_skip
    assert isinstance(block.input_quantizer, FakeQuant)
    assert isinstance(block.conv_pw.input_quantizer, nn.Identity)
    assert isinstance(block.conv_dw.input_quantizer, FakeQuant)
    plain = quantized.blocks[1][0]
    assert not plain.has_skip
    assert not hasattr(plain, "input_quantizer")
    assert isinstance(plain.conv_pw.input_quantizer, FakeQuant)


def test_block_whose_convolutions_all_stay_float_has_no_quantizer():
    net = real_net("mobilenetv3_small_100")
    quantized, kept = quantize_net(net, pictures(4), keep=["blocks.1", "conv_stem"])
    assert kept == ["blocks.1", "conv_stem"]
    assert not any(isinstance(module, FakeQuant) for module in quantized.blocks[1].modules())
    assert isinstance(quantized.classifier, QuantLinear)


def test_block_that_halves_the_picture_quantizes_its_skip_convolution_too():
    """ResNet adds the output of a convolution on the skip path, and two convolutions read the block's input."""
    quantized, _ = quantize_net(real_net("resnet18"), pictures(4))
    block = quantized.layer2[0]
    assert isinstance(block.input_quantizer, FakeQuant)
    assert isinstance(block.conv1.input_quantizer, nn.Identity)
    assert isinstance(block.downsample[0].input_quantizer, nn.Identity)
    assert isinstance(block.downsample.skip_quantizer, FakeQuant)


@pytest.mark.parametrize(
    ("keep", "problem"),
    [
        (["blocks.9"], "no module 'blocks.9'"),
        (["conv_stem", "blocks", "conv_head", "classifier"], "nothing is left to quantize"),
    ],
)
def test_wrong_choice_of_what_to_keep_is_named(keep, problem):
    with pytest.raises(RecipeError) as caught:
        quantize_net(real_net("mobilenetv3_small_100"), pictures(2), keep=keep)
    assert problem in caught.value.problem


def test_kind_of_convolution_that_is_unknown_is_named():
    with pytest.raises(RecipeError, match=r"quantize 'conv_stem': .*Conv2dSame, not"):
        quantize_net(create_backbone("tf_mobilenetv3_small_minimal_100"), pictures(2), keep=[])


def test_float_copy_is_the_folded_net_to_the_bit(small):
    net, quantized, _ = small
    folded, plain = fold_batch_norm(net), without_fake_quant(quantized)
    with torch.no_grad():
        assert torch.equal(plain(pictures(2)), folded(pictures(2)))
        assert not torch.equal(quantized(pictures(2)), folded(pictures(2)))
    assert list(plain.state_dict()) == list(folded.state_dict())


def test_float_copy_is_quantized_again_as_the_net_was(small):
    _, quantized, _ = small
    again, _ = quantize_net(without_fake_quant(quantized), pictures(16))
    with torch.no_grad():
        assert torch.equal(again(pictures(2)), quantized(pictures(2)))
    check_pairs(exported(again), again)


# --- what is exported ---


class Blocks(nn.Module):
    """Two timm blocks of which one has a gate and a skip, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.separable = DepthwiseSeparableConv(16, 16)
        self.inverted = InvertedResidual(
            16, 16, exp_ratio=3.0, se_layer=SqueezeExcite, act_layer=nn.Hardswish
        )
        self.classifier = nn.Linear(16, 4)

    def forward(self, images):
        return self.classifier(self.inverted(self.separable(self.stem(images))).mean((2, 3)))


def exported(net, *, opset=17, dynamic=True):
    graph = Graph(opset=opset, hard_swish="hard_sigmoid", dynamic_batch=dynamic)
    return onnx_from_net(net, graph=graph, shape=(3, 64, 64), metadata={})


def run_unoptimized(model, images):
    """ONNX Runtime as the graph says it: optimized, it rounds biases too."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


def check_pairs(model, net):
    """Hold a graph to the form that TensorRT reads, and to the net's own scales."""
    weights = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    quantized = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    restored = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    scales = []
    for node in quantized:
        (back,) = readers[node.output[0]]
        assert back.op_type == "DequantizeLinear"
        assert list(back.input[1:]) == list(node.input[1:])
        scale, zero = weights[node.input[1]], weights[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert scale.dtype == np.float32
        assert (scale > 0).all()
        scales.append(scale)
        if node.input[0] in weights:
            assert weights[node.input[0]].dtype == np.float32
            assert scale.shape == zero.shape == weights[node.input[0]].shape[:1]
            assert [each.i for each in node.attribute if each.name == "axis"] == [0]
        else:
            assert scale.shape == zero.shape == ()
            assert {each.op_type for each in readers[back.output[0]]} <= {"Conv", "Gemm", "MatMul", "Add"}
    # One pair for each tensor, and one for each quantizer of the net.
    assert len({node.input[0] for node in quantized}) == len(quantized) == len(restored)
    modules = [module for module in net.modules() if isinstance(module, FakeQuant)]
    assert sorted(scale.tobytes() for scale in scales) == sorted(
        module.scale.numpy().tobytes() for module in modules
    )
    from_int8 = {name for node in restored for name in node.output}
    layers = [each for each in net.modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    written = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(written) == len(layers)
    int8_layers = sum(isinstance(each, (QuantConv2d, QuantLinear)) for each in layers)
    assert sum(set(node.input[:2]) <= from_int8 for node in written) == int8_layers
    # A bias is stored as it is; one of zeros is left out.
    assert all(set(node.input[2:]) <= weights.keys() for node in written)
    for node in model.graph.node:
        if node.op_type == "Add":
            (main,) = (name for name in node.input if name not in from_int8)
            assert makers[main].op_type in ("Conv", "Mul")


@pytest.fixture(scope="module")
def blocks():
    torch.manual_seed(0)
    net = Blocks().eval()
    recalibrate(net, [pictures(16)], device=torch.device("cpu"))
    return net, quantize_net(net, pictures(16), keep=["stem", "inverted.se"])[0]


def test_exported_graph_computes_what_torch_computes(blocks):
    net, quantized = blocks
    images = pictures(16)
    found = run_unoptimized(exported(quantized), images)
    with torch.no_grad():
        expected, unrounded = quantized(images), net(images)
    size = float(expected.abs().max())
    assert float((expected - unrounded).abs().max()) > 0.003 * size
    # A value near the middle of two steps may go to the other one.
    assert float((found - expected).abs().max()) < 0.001 * size


def test_exported_graph_is_what_tensorrt_reads(blocks):
    model = exported(blocks[1])
    check_pairs(model, blocks[1])
    adds = [node for node in model.graph.node if node.op_type == "Add"]
    assert len(adds) == 2


@pytest.mark.parametrize(
    ("arch", "adds", "pairs"),
    [
        ("mobilenetv1_100", 0, 52),
        pytest.param("mobilenetv3_large_100", 10, 92, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", 9, 96, marks=pytest.mark.slow),
        pytest.param("resnet18", 8, 38, marks=pytest.mark.slow),
    ],
)
def test_whole_nets_export_to_what_tensorrt_builds(arch, adds, pairs):
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    quantized, _ = quantize_net(real_net(arch), pictures(8))
    model = exported(quantized, dynamic=False)
    check_pairs(model, quantized)
    assert sum(node.op_type == "Add" for node in model.graph.node) == adds
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == pairs
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [
        parser.get_error(index).desc() for index in range(parser.num_errors)
    ]
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    assert kinds.count(trt.LayerType.QUANTIZE) == kinds.count(trt.LayerType.DEQUANTIZE) == pairs
    assert builder.build_serialized_network(network, builder.create_builder_config()) is not None
