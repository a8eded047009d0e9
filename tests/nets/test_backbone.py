"""timm networks at any width."""

import numpy as np
import pytest
import timm
import torch
from every_net import LAYER_NORMS, every_net
from torch import nn

from edgecl.errors import RecipeError, SliceError
from edgecl.nets.backbone import (
    count_parameters,
    create_backbone,
    example_side,
    feature_count,
    is_norm,
    recalibrate,
)


def shapes(net):
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def on_meta(arch, **settings):
    with torch.device("meta"):
        return create_backbone(arch, **settings)


@pytest.mark.parametrize("arch", every_net())
def test_width_one_is_timms_own_net(arch):
    with torch.device("meta"):
        own = timm.create_model(arch, num_classes=0)
    assert shapes(on_meta(arch)) == shapes(own)


@pytest.mark.parametrize("arch", every_net())
def test_building_at_width_one_by_scaling_gives_timms_own_shapes(arch):
    """The path that other widths take, at a width too close to 1 to round anywhere else."""
    assert shapes(on_meta(arch, width=1.0000001)) == shapes(on_meta(arch))


def widest(arch, width):
    """Channels between the widest stages of the trunk; heads have rules of their own."""
    return max(stage["num_chs"] for stage in on_meta(arch, width=width).feature_info)


@pytest.mark.parametrize("width", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("arch", every_net())
def test_width_multiplies_the_channels_of_the_trunk(arch, width):
    head = 64 if arch in LAYER_NORMS else 0
    assert widest(arch, width) == pytest.approx(width * widest(arch, 1.0), rel=0.05, abs=head / 2)


def test_scaling_leaves_timms_module_alone():
    before = shapes(on_meta("mobilenetv3_small_100"))
    on_meta("mobilenetv3_small_100", width=2.0)
    assert shapes(on_meta("mobilenetv3_small_100")) == before
    with torch.device("meta"):
        assert shapes(timm.create_model("mobilenetv3_small_100", num_classes=0)) == before


@pytest.mark.parametrize(
    ("arch", "width", "same_as"),
    [
        ("mobilenetv3_small_100", 0.5, "mobilenetv3_small_050"),
        ("mobilenetv3_small_100", 0.75, "mobilenetv3_small_075"),
        ("repghostnet_100", 2.0, "repghostnet_200"),
        ("repvit_m0_9", 56 / 48, "repvit_m1_0"),
        ("vit_tiny_patch16_224", 2.0, "vit_small_patch16_224"),
        ("deit_small_patch16_224", 0.5, "deit_tiny_patch16_224"),
    ],
)
def test_a_scaled_net_is_timms_net_of_that_width(arch, width, same_as):
    assert shapes(on_meta(arch, width=width)) == shapes(on_meta(same_as))


@pytest.mark.parametrize("width", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("arch", every_net())
def test_features_are_as_many_as_counted(arch, width):
    net = on_meta(arch, width=width)
    side = example_side(net)
    assert net(torch.zeros(2, 3, side, side, device="meta")).shape == (2, feature_count(net))


@pytest.mark.parametrize(("stride", "side"), [(None, 16), (1, 32), (2, 16)])
def test_stem_stride_sets_the_first_convolution(stride, side):
    net = create_backbone("mobilenetv3_small_100", width=0.5, stem_stride=stride)
    assert net.conv_stem(torch.zeros(1, 3, 32, 32)).shape[-2:] == (side, side)


def test_stem_stride_sets_every_branch_of_the_first_convolution():
    net = create_backbone("mobileone_s0", width=0.5, stem_stride=1).eval()
    assert net.stem(torch.zeros(1, 3, 32, 32)).shape[-2:] == (32, 32)


@pytest.mark.parametrize(
    ("arch", "side"),
    [("mobilenetv3_small_100", 64), ("efficientformerv2_s0", 224), ("vit_tiny_patch16_384", 384)],
)
def test_an_example_is_as_large_as_the_net_takes(arch, side):
    assert example_side(nn.Sequential(on_meta(arch))) == side


def test_classes_add_a_classifier():
    assert on_meta("mobilenetv3_small_100", width=0.5, num_classes=7)(
        torch.zeros(2, 3, 32, 32, device="meta")
    ).shape == (2, 7)


def test_an_unknown_architecture_is_named_with_its_near_match():
    with pytest.raises(RecipeError, match="no architecture 'mobilenetv3_large_10'") as caught:
        create_backbone("mobilenetv3_large_10")
    assert "'mobilenetv3_large_100'" in caught.value.hint


@pytest.mark.parametrize("arch", ["densenet121", "vgg11"])
def test_an_architecture_without_a_multiplier_is_named(arch):
    with pytest.raises(SliceError, match=rf"'{arch}' at width 1\.5: .*take a width") as caught:
        create_backbone(arch, width=1.5)
    assert "[host] width = 1.0" in caught.value.hint


def test_parameters_are_counted_without_buffers():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert count_parameters(net) == 4 * 3 * 9 + 4 + 4 + 4


def first_norm_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Flatten())


def test_recalibration_averages_the_statistics_of_the_batches_and_forgets_those_before():
    net = first_norm_net()
    net(100 * torch.randn(4, 3, 6, 6))
    batches = [torch.randn(4, 3, 6, 6) + shift for shift in (0.0, 1.0, -2.0)]
    kernel = net[0].weight.detach().numpy().astype(np.float64)
    means, variances = [], []
    for batch in batches:
        pixels = batch.numpy().astype(np.float64)
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), axis=(2, 3))
        outputs = np.einsum("nchwij,ocij->onhw", windows, kernel).reshape(5, -1)
        means.append(outputs.mean(axis=1))
        variances.append(outputs.var(axis=1, ddof=1))
    assert recalibrate(net, batches, device=torch.device("cpu")) == 3
    np.testing.assert_allclose(net[1].running_mean, np.mean(means, axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(net[1].running_var, np.mean(variances, axis=0), rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_recalibration_changes_statistics_and_nothing_else(training):
    net = first_norm_net().train(training)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    recalibrate(net, [torch.randn(4, 3, 6, 6)], device=torch.device("cpu"))
    assert all(torch.equal(before[name], parameter) for name, parameter in net.named_parameters())
    assert net.training is training
    assert [module.momentum for module in net.modules() if is_norm(module)] == [0.1]
