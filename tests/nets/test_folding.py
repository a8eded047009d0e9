"""Folding: the same function without a batch norm, every module still in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgecl.errors import RecipeError
from edgecl.nets.backbone import create_backbone, is_norm
from edgecl.nets.folding import fold_batch_norm

ARCHS = [
    "mobilenetv1_100",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "efficientnet_lite0",
    "resnet18",
]


def net_with_norms(arch):
    """A net in which every norm does something: timm's start at the identity."""
    torch.manual_seed(0)
    net = create_backbone(arch, num_classes=5).eval()
    with torch.no_grad():
        for module in net.modules():
            if is_norm(module):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
    return net


@pytest.mark.parametrize("arch", ARCHS)
def test_folded_net_computes_the_same_without_a_norm(arch):
    net = net_with_norms(arch)
    images = torch.randn(2, 3, 96, 96)
    folded = fold_batch_norm(net)
    assert not any(is_norm(module) for module in folded.modules())
    with torch.no_grad():
        expected, found = net(images), folded(images)
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


def test_every_module_keeps_its_name_and_the_net_itself_is_left_alone():
    net = net_with_norms("mobilenetv3_small_100")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    folded = fold_batch_norm(net)
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in net.named_modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_activation_of_a_norm_that_has_one_stays():
    folded = fold_batch_norm(net_with_norms("mobilenetv1_100"))
    assert list(dict(folded.bn1.named_children())) == ["drop", "act"]
    assert isinstance(folded.bn1.act, nn.ReLU6)


def test_folded_weights_are_those_of_the_formula():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4, eps=0.1)).eval()
    convolution, norm = net
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 4)
    factor = (norm.weight / (norm.running_var + 0.1).sqrt()).detach().numpy().astype(np.float64)
    weight = convolution.weight.detach().numpy() * factor[:, None, None, None]
    bias = (convolution.bias - norm.running_mean).detach().numpy() * factor + norm.bias.detach().numpy()
    folded = fold_batch_norm(net)[0]
    np.testing.assert_allclose(folded.weight.detach().numpy(), weight, rtol=1e-6)
    np.testing.assert_allclose(folded.bias.detach().numpy(), bias, rtol=1e-5)


def test_norm_without_weights_folds():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)).eval()
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
        images = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(fold_batch_norm(net)(images), net(images))


class Twice(nn.Module):
    """A convolution whose output goes two ways."""

    def __init__(self, other: nn.Module):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.other = other
        with torch.no_grad():
            self.norm.running_mean.fill_(2)

    def forward(self, images):
        features = self.conv(images)
        return self.norm(features) + self.other(features)


@pytest.mark.parametrize(
    ("net", "problem"),
    [
        (
            nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
            "cannot fold '0': no convolution comes right before it",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
            "cannot fold '2': no convolution comes right before it",
        ),
        (Twice(nn.BatchNorm2d(3)), "cannot fold 'other': 'conv' feeds 'norm' too"),
        (Twice(nn.Identity()), "cannot fold the batch norms: the output changes by"),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), "the net does not take a picture of 64 x 64: "),
    ],
    ids=["first", "activation between", "two norms", "read elsewhere", "other size"],
)
def test_net_that_cannot_be_folded_is_named(net, problem):
    with pytest.raises(RecipeError) as caught:
        fold_batch_norm(net)
    assert caught.value.problem.startswith(problem)
    assert caught.value.hint == (
        "this serves nets of convolutions, each followed by its norm: MobileNets, EfficientNets, ResNets"
    )
