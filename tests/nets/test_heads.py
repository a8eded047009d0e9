"""Projector and encoder."""

import pytest
import torch
from torch import nn

from edgecl.nets.backbone import create_backbone
from edgecl.nets.heads import Encoder, Projector
from edgecl.nets.small_maps import speed_up_small_maps


def test_projector_is_linear_norm_relu_and_ends_bare():
    projector = Projector(10, [6, 7, 4])
    kinds = [type(layer) for layer in projector]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [*hidden, *hidden, nn.Linear]
    linears = [layer for layer in projector if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [(6, 10), (7, 6), (4, 7)]
    assert all(layer.bias is None for layer in linears)
    assert [type(layer) for layer in Projector(10, [4])] == [nn.Linear]


@pytest.mark.parametrize("arch", ["mobilenetv3_small_100", "efficientnet_b0"])
def test_encoder_maps_images_to_projections(arch):
    with torch.device("meta"):
        encoder = Encoder(arch, width=1.5, projector=[16, 8], stem_stride=1)
        assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 8)


def clones_of_a_pass(net, images):
    with torch.autograd.profiler.profile() as seen:
        net(images)
    return sum(event.name == "aten::clone" for event in seen.function_events)


@pytest.mark.parametrize(
    "arch", ["mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "resnet18"]
)
def test_learning_copies_no_activation_and_computes_what_timms_net_computes(arch):
    """Autograd copies the input of an activation in place whose gradient needs it; timm has them all in place."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    encoder, plain = Encoder(arch, width=1.0, projector=[8]).backbone, create_backbone(arch)
    plain.load_state_dict(encoder.state_dict())
    speed_up_small_maps(plain)  # of that tests/nets/test_small_maps.py tells
    assert clones_of_a_pass(encoder, images) == 0
    assert (clones_of_a_pass(plain, images) > 0) == (arch != "resnet18")
    found, expected = encoder(images), plain(images)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(encoder.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
