"""Folding: the same function without a batch norm, every module still in its place."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from edgecl.data.demo_images import render
from edgecl.data.loading import normalize
from edgecl.errors import RecipeError
from edgecl.evaluate.cost import forward_cost
from edgecl.nets.backbone import count_parameters, create_backbone, is_norm
from edgecl.nets.folding import fold_batch_norm, fuse_branches, has_branches

ARCHS = [
    "mobilenetv1_100",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "efficientnet_lite0",
    "resnet18",
]


def net_with_norms(arch, **settings):
    """A net in which every norm does something: timm's start at the identity."""
    torch.manual_seed(0)
    net = create_backbone(arch, **{"num_classes": 5, **settings}).eval()
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


# Giga-MACs and million parameters after fusing, at the side the net was measured at, as the authors print them: RepViT's and
# MobileOne's in their papers' tables, FastViT's in Apple's model cards, RepGhost's in the names of its files, LCNetV2's in
# PaddleClas. Batch norms that are folded at inference are not counted.
PRINTED = {
    "repvit_m0_9": (224, 0.8, 5.1),
    "repvit_m1_0": (224, 1.1, 6.8),
    "mobileone_s0": (224, 0.275, 2.1),
    "mobileone_s1": (224, 0.825, 4.8),
    "fastvit_t8": (256, 0.7, None),
    "fastvit_t12": (256, 1.4, None),
    "fastvit_s12": (256, 1.8, None),
    "repghostnet_100": (224, 0.142, 4.1),
    "lcnetv2_base": (224, 0.604, 6.6),
}


@pytest.mark.parametrize(("arch", "printed"), PRINTED.items())
def test_fused_macs_are_those_that_the_authors_print(arch, printed):
    side, macs_g, params_m = printed
    fused = fuse_branches(create_backbone(arch, num_classes=1000))
    counted = forward_cost(fused, (1, 3, side, side))
    assert (counted.macs - counted.by_operator.get("batch_norm", 0)) / 1e9 == pytest.approx(macs_g, rel=0.035)
    if params_m:
        assert count_parameters(fused) / 1e6 == pytest.approx(params_m, rel=0.015)


BRANCHES = ["fastvit_t8", "lcnetv2_small", "mobileone_s0", "repghostnet_050", "repvit_m0_9"]


@pytest.fixture(scope="module")
def pictures():
    """Four pictures of the demo, normalized."""
    drawn = torch.from_numpy(render("test", 4, size=128)[0]).permute(0, 3, 1, 2)
    return normalize(drawn, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("arch", BRANCHES)
def test_fused_net_computes_the_same_on_real_images(arch, width, pictures):
    net = net_with_norms(arch, width=width)
    fused = fuse_branches(net)
    assert has_branches(net)
    assert not has_branches(fused)
    assert len(list(fused.parameters())) < len(list(net.parameters()))
    with torch.no_grad():
        expected, found = net(pictures), fused(pictures)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_net_without_branches_is_itself():
    net = net_with_norms("mobilenetv3_small_100")
    assert fuse_branches(net) is net


@pytest.mark.parametrize("arch", BRANCHES)
def test_a_fused_net_stays_as_it_is(arch):
    fused = fuse_branches(net_with_norms(arch))
    assert fuse_branches(copy.deepcopy(fused)).state_dict().keys() == fused.state_dict().keys()


def test_a_stem_of_another_stride_fuses():
    for arch in ("fastvit_t8", "mobileone_s0"):
        net = net_with_norms(arch, stem_stride=1)
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(fuse_branches(net)(images), net(images), rtol=1e-4, atol=1e-4)


def test_fusing_that_changes_the_output_is_named():
    class Wrong(nn.Sequential):
        def fuse(self):
            return nn.Conv2d(3, 4, 1)

    with pytest.raises(RecipeError, match="cannot fuse the branches"):
        fuse_branches(nn.Sequential(Wrong(nn.Conv2d(3, 4, 1))))


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


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "0"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)), "3"),
    ],
    ids=["first", "activation between"],
)
def test_norm_that_no_convolution_feeds_stays(net, name):
    net(torch.randn(64, 3, 8, 8))
    folded = fold_batch_norm(net.eval())
    assert [each for each, module in folded.named_modules() if is_norm(module)] == [name]
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded(images), net(images))


def test_norm_whose_convolution_is_added_too_stays():
    net = Twice(nn.Identity()).eval()
    images = torch.randn(2, 3, 8, 8)
    folded = fold_batch_norm(net)
    assert is_norm(folded.norm)
    torch.testing.assert_close(folded(images), net(images))


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
    ("net", "words"),
    [
        (Twice(nn.BatchNorm2d(3)), "fold 'other': 'conv' feeds 'norm'"),
        (Twice(nn.ReLU()), "fold.*output changes by"),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), "not take pictures of 64 x 64: "),
    ],
    ids=["two norms", "read elsewhere", "other size"],
)
def test_net_that_cannot_be_folded_is_named(net, words):
    with pytest.raises(RecipeError, match=words) as caught:
        fold_batch_norm(net)
    assert "MobileNets, EfficientNets, ResNets" in caught.value.hint
