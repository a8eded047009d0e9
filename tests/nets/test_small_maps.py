"""Convolutions of small maps: equal to torch's own, chosen by shape alone, and gone from what is saved."""

import copy

import pytest
import torch
from torch import nn

from edgecl.evaluate.cost import forward_cost
from edgecl.nets.backbone import create_backbone
from edgecl.nets.heads import Encoder
from edgecl.nets.small_maps import (
    SmallMapConv2d,
    _DepthwiseOnSmallMap,
    small_maps_sped_up,
    speed_up_small_maps,
)

NETS = ("mobilenetv3_small_050", "mobilenetv1_100", "mobilenetv4_conv_small", "efficientnet_b0")


def convolutions_of(arch, *, size):
    """Every kind of convolution of a net once: (settings, (height, width) of its input)."""
    net = create_backbone(arch).eval()
    found = {}

    def note(module, inputs, output):
        settings = {
            name: getattr(module, name)
            for name in (
                "in_channels",
                "out_channels",
                "kernel_size",
                "stride",
                "padding",
                "dilation",
                "groups",
            )
        }
        settings["bias"] = module.bias is not None
        found[str((settings, inputs[0].shape))] = (settings, tuple(inputs[0].shape[2:]))

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        net(torch.zeros(1, 3, size, size))
    return list(found.values())


def outputs_and_gradients(convolution, images, pull):
    images = images.detach().requires_grad_()
    outputs = convolution(images)
    outputs.backward(pull)
    return [outputs.detach(), images.grad, *(parameter.grad for parameter in convolution.parameters())]


def assert_as_exact_as_torchs(settings, images):
    """Hold a convolution to float64's numbers, as closely as torch's own float32 comes to them."""
    torch.manual_seed(0)
    plain = nn.Conv2d(**settings)
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else None
    if layout:
        plain.to(memory_format=layout)
    quick, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    speed_up_small_maps(quick)
    pull = torch.randn(plain(images).shape)
    pull = pull.contiguous(memory_format=layout) if layout else pull
    true = outputs_and_gradients(exact, images.double(), pull.double())
    theirs = outputs_and_gradients(plain, images, pull)
    ours = outputs_and_gradients(quick, images, pull)
    for wanted, torchs, found in zip(true, theirs, ours, strict=True):
        assert found.dtype == torch.float32
        assert found.shape == torchs.shape
        scale = wanted.abs().max()
        allowed = 4 * (torchs - wanted).abs().max() + 8 * torch.finfo(torch.float32).eps * scale
        assert (found - wanted).abs().max() <= allowed


@pytest.mark.parametrize("batch", [1, 5, 32])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("arch", NETS)
def test_outputs_and_gradients_are_as_exact_as_torchs_own(arch, size, batch):
    generator = torch.Generator().manual_seed(1)
    for settings, map_size in convolutions_of(arch, size=size):
        # As many channels decide nothing, and take long.
        images = torch.randn(batch, settings["in_channels"], *map_size, generator=generator)
        assert_as_exact_as_torchs(settings, images.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "size"),
    [
        ((5, 5), (1, 1), (2, 2), (1, 1), (4, 4)),
        ((5, 5), (2, 2), (2, 2), (1, 1), (4, 4)),
        ((5, 5), (2, 1), (2, 2), (1, 1), (3, 5)),
        ((7, 3), (1, 2), (3, 1), (1, 1), (2, 6)),
        ((3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
        ((5, 5), (1, 1), (4, 3), (1, 1), (4, 4)),
        ((4, 4), (1, 1), (1, 1), (1, 1), (3, 4)),
        ((5, 5), (1, 1), (4, 4), (2, 2), (4, 4)),
        ((5, 5), (1, 1), "same", (1, 1), (4, 4)),
        ((1, 1), (1, 1), (0, 0), (1, 1), (1, 1)),
        ((1, 1), (2, 2), (0, 0), (1, 1), (4, 4)),
        ((1, 1), (1, 1), (1, 1), (1, 1), (4, 4)),
    ],
)
@pytest.mark.parametrize(("channels", "groups"), [(6, 6), (6, 1), (6, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_every_setting_is_computed_as_torch_does(
    channels, groups, bias, kernel, stride, padding, dilation, size, memory_format
):
    settings = {
        "in_channels": channels,
        "out_channels": channels,
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": bias,
    }
    images = torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(2))
    assert_as_exact_as_torchs(settings, images.contiguous(memory_format=memory_format))


def test_weight_gradient_is_the_derivative_of_the_outputs():
    """By finite differences, which know of no convolution."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: _DepthwiseOnSmallMap.apply(x, w, (1, 2), (2, 2)), (images, weight)
    )


def test_a_frozen_kernel_or_input_asks_for_no_gradient():
    convolution = nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False).to(memory_format=torch.channels_last)
    speed_up_small_maps(convolution)
    images = torch.randn(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    convolution(images).sum().backward()
    assert convolution.weight.grad is not None
    convolution.requires_grad_(False)
    images.requires_grad_()
    convolution(images).sum().backward()
    assert images.grad is not None
    with torch.no_grad():
        assert not convolution(images).requires_grad


def operators_of(convolution, images):
    with torch.autograd.profiler.profile() as seen:
        convolution(images)
    return {event.name for event in seen.function_events}


def pointwise(channels=4):
    convolution = nn.Conv2d(channels, channels, 1).to(memory_format=torch.channels_last)
    speed_up_small_maps(convolution)
    return convolution


def test_small_maps_of_the_measured_kind_are_matrix_products_and_all_others_torchs_own():
    small = torch.randn(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    large = torch.randn(2, 4, 64, 64).contiguous(memory_format=torch.channels_last)
    assert "aten::convolution" not in operators_of(pointwise(), small)
    assert "aten::convolution" in operators_of(pointwise(), large)
    assert "aten::convolution" in operators_of(pointwise(), torch.randn(2, 4, 4, 4))
    assert "aten::convolution" in operators_of(pointwise().double(), small.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "aten::convolution" in operators_of(pointwise(), small)


def test_evaluation_is_torchs_own_to_the_bit():
    torch.manual_seed(0)
    plain = create_backbone("mobilenetv3_small_050").eval().to(memory_format=torch.channels_last)
    quick = copy.deepcopy(plain)
    speed_up_small_maps(quick)
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(quick(images), plain(images))
        assert not torch.equal(quick.train()(images), plain.train()(images))


def test_a_traced_net_holds_convolutions():
    """What counts operators, and exporters that trace, read the net that was written."""
    images = torch.randn(1, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    assert "aten::_convolution" in str(torch.jit.trace(pointwise(), images).inlined_graph)


def test_an_encoders_cost_is_that_of_timms_net():
    shape = (1, 3, 32, 32)
    found = forward_cost(Encoder("mobilenetv3_small_050", width=1.0, projector=[8]).backbone, shape)
    assert found == forward_cost(create_backbone("mobilenetv3_small_050"), shape)


def test_names_and_weights_stay_and_timms_net_takes_them_back():
    torch.manual_seed(0)
    plain = create_backbone("mobilenetv3_small_050")
    quick = copy.deepcopy(plain)
    speed_up_small_maps(quick)
    assert list(quick.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(quick.parameters(), plain.parameters(), strict=True))
    assert repr(quick).replace("SmallMapConv2d", "Conv2d") == repr(plain)


def test_a_convolution_of_a_kind_of_its_own_is_left_alone():
    class Other(nn.Conv2d):
        pass

    net = nn.Sequential(Other(3, 3, 1), nn.Conv2d(3, 3, 1))
    speed_up_small_maps(net)
    assert [type(module) for module in net] == [Other, SmallMapConv2d]


def test_a_net_sped_up_for_a_while_is_torchs_own_afterwards_whatever_happens():
    net = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(ZeroDivisionError, match="SmallMapConv2d"), small_maps_sped_up(net):
        raise ZeroDivisionError(type(net[0]))
    assert type(net[0]) is nn.Conv2d
