"""A slim net is a prefix of its host, shares all but its norms, and anything else is an error."""

from functools import partial

import pytest
import torch
from torch import nn

from edgecl.errors import SliceError
from edgecl.nets.backbone import count_parameters, create_backbone, is_norm
from edgecl.nets.catalogue import NETS
from edgecl.nets.heads import Encoder
from edgecl.nets.slimming import SlimmableNet, check_nesting

SMALL = "mobilenetv3_small_100"


def shapes(arch, width):
    with torch.device("meta"):
        net = Encoder(arch, width=width, projector=[16, 8])
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def slim_bare(arch, *, host_width=1.5, slim_width=1.0):
    return SlimmableNet(
        lambda width: create_backbone(arch, width=width), host_width=host_width, slim_width=slim_width
    )


@pytest.fixture
def net(slimmable):
    return slimmable.__wrapped__(SMALL, host_width=1.5, slim_width=0.5)


@pytest.fixture
def images():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("host_width", [1.0, 1.1, 1.5, 2.0, 3.3, 4.0])
@pytest.mark.parametrize("slim_width", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("arch", NETS)
def test_shapes_nest(arch, slim_width, host_width):
    check_nesting(
        shapes(arch, slim_width), shapes(arch, host_width), slim_width=slim_width, host_width=host_width
    )


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_equal_widths_are_one_net(width):
    net = SlimmableNet(lambda width: nn.Linear(3, int(4 * width)), host_width=width, slim_width=width)
    assert not net.has_slim
    assert len(net.slim_norms) == 0
    images = torch.randn(2, 3)
    assert torch.equal(net.forward_slim(images), net.forward_host(images))
    assert net.slim_tensors()["weight"] is net.host.weight


@pytest.mark.parametrize("channels_last", [False, True])
def test_slim_pass_is_that_of_a_plain_net_with_the_sliced_tensors(net, images, channels_last):
    """Training mode: outputs, and the gradient of every tensor, against an ordinary small net."""
    plain = Encoder(SMALL, width=0.5, projector=[8, 4])
    plain.load_state_dict({name: tensor.detach().clone() for name, tensor in net.slim_tensors().items()})
    if channels_last:
        net.to(memory_format=torch.channels_last)
    expected = plain(images)
    found = net.forward_slim(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    host = dict(net.host.named_parameters())
    for name, parameter in plain.named_parameters():
        if name in net._slices:
            gradient = host[name].grad[net._slices[name]]
        else:
            module, _, leaf = name.rpartition(".")
            gradient = net.slim_norms[module.replace(".", "/")].get_parameter(leaf).grad
        scale = max(float(parameter.grad.abs().max()), 1e-3)
        assert float((gradient - parameter.grad).abs().max()) <= 2e-3 * scale, name


def test_gradient_of_the_slim_net_stays_inside_its_block(net, images):
    net.forward_slim(images).square().sum().backward()
    reached = 0
    for name, parameter in net.host.named_parameters():
        if name not in net._slices:
            assert parameter.grad is None, name
            continue
        outside = parameter.grad.clone()
        outside[net._slices[name]] = 0
        assert torch.count_nonzero(outside) == 0, name
        reached += bool(torch.count_nonzero(parameter.grad))
    assert reached > 0.9 * len(net._slices)


def test_gradient_of_the_host_reaches_no_slim_norm(net, images):
    net.forward_host(images).square().sum().backward()
    assert all(parameter.grad is None for parameter in net.slim_norms.parameters())
    assert all(parameter.grad is not None for parameter in net.host.parameters())


def host_statistics(net):
    return {name: tensor.clone() for name, tensor in net.host.named_buffers()}


def slim_statistics(net):
    return {name: tensor.clone() for name, tensor in net.slim_norms.named_buffers()}


def test_training_the_slim_net_leaves_the_hosts_statistics_alone(net, images):
    host, slim = host_statistics(net), slim_statistics(net)
    net.forward_slim(images)
    assert all(torch.equal(tensor, host[name]) for name, tensor in net.host.named_buffers())
    assert all(not torch.equal(tensor, slim[name]) for name, tensor in net.slim_norms.named_buffers())


def test_training_the_host_leaves_the_slim_statistics_alone(net, images):
    host, slim = host_statistics(net), slim_statistics(net)
    net.forward_host(images)
    assert all(torch.equal(tensor, slim[name]) for name, tensor in net.slim_norms.named_buffers())
    assert all(not torch.equal(tensor, host[name]) for name, tensor in net.host.named_buffers())


def test_an_optimiser_step_on_the_slim_net_moves_the_hosts_weights(net, images):
    before = net.host.backbone.conv_stem.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.forward_slim(images).square().sum().backward()
    optimizer.step()
    moved = net.host.backbone.conv_stem.weight.detach() != before
    kept = net._slices["backbone.conv_stem.weight"][0]
    assert moved[kept].any()
    assert not moved[kept.stop :].any()


def test_parameters_are_the_hosts_and_the_private_norms_and_no_skeleton(net):
    skeleton = net._skeleton[0]
    norms = sum(count_parameters(module) for module in skeleton.modules() if is_norm(module))
    assert count_parameters(net) == count_parameters(net.host) + norms
    assert not any(parameter.is_meta for parameter in net.parameters())
    assert not any(buffer.is_meta for buffer in net.buffers())


def test_evaluation_mode_reaches_the_slim_net(net, images):
    net.eval()
    before = slim_statistics(net)
    first, alone = net.forward_slim(images), net.forward_slim(images[:1])
    torch.testing.assert_close(first[:1], alone, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.slim_norms.named_buffers())
    net.train()
    assert not torch.allclose(net.forward_slim(images), first, rtol=1e-2)


def test_slim_norms_start_at_the_hosts_values():
    net = slim_bare("resnet50", slim_width=0.5)
    # Zero-initialised last norms of a residual block, and ones elsewhere.
    for name, module in net._skeleton[0].named_modules():
        if is_norm(module):
            host = net.host.get_submodule(name)
            assert torch.equal(module.weight, host.weight[: len(module.weight)]), name
            assert torch.equal(module.bias, host.bias[: len(module.bias)]), name


def test_state_survives_a_round_trip(net, images, slimmable):
    other = SlimmableNet(
        lambda width: Encoder(SMALL, width=width, projector=[8, 4]), host_width=1.5, slim_width=0.5
    )
    other.load_state_dict(net.state_dict())
    net.eval()
    other.eval()
    assert torch.equal(net.forward_slim(images), other.forward_slim(images))
    assert torch.equal(net.forward_host(images), other.forward_host(images))


def test_watched_slices_get_the_slim_passs_gradient_only(net, images):
    net.watched = {}
    (net.forward_host(images).sum() + net.forward_slim(images).square().sum()).backward()
    watched = {name: tensor.grad.clone() for name, tensor in net.watched.items()}
    net.watched = None
    net.zero_grad()
    net.forward_slim(images).square().sum().backward()
    assert watched.keys() == net._slices.keys()
    host = dict(net.host.named_parameters())
    for name, gradient in watched.items():
        expected = host[name].grad[net._slices[name]]
        torch.testing.assert_close(
            gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max() + 1e-6)
        )


def test_nothing_is_watched_in_a_frozen_pass(net, images):
    net.watched = {}
    with net.frozen():
        net.forward_slim(images)
    assert net.watched == {}


def test_a_slim_net_wider_than_its_host_is_named():
    with pytest.raises(SliceError) as caught:
        slim_bare(SMALL, host_width=1.0, slim_width=1.5)
    assert caught.value.problem == "slim width 1.5 is above the host's 1"
    assert "widen the host or narrow the slim net" in caught.value.hint


def test_a_net_whose_names_change_with_width_is_named():
    with pytest.raises(
        SliceError, match=r"cannot slice this net: 'layer1\.0\.downsample\.0\.weight'"
    ) as caught:
        slim_bare("resnet18")
    assert "is in one width and not in the other" in caught.value.problem
    assert caught.value.where == {"host width": "1.5", "slim width": "1"}
    assert "`edgecl ls nets`" in caught.value.hint


@pytest.mark.parametrize(
    ("arch", "slim_width"),
    [("resnext50_32x4d", 1.0), ("mixnet_s", 1.0), ("mixnet_s", 0.5), ("resnet50_gn", 1.0)],
)
def test_a_net_whose_function_changes_with_width_is_named(arch, slim_width):
    with pytest.raises(SliceError, match="cannot slice") as caught:
        slim_bare(arch, slim_width=slim_width)
    assert caught.value.where == {"host width": "1.5", "slim width": f"{slim_width:g}"}
    assert caught.value.hint


def group_norm_net(width):
    channels = int(8 * width)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.GroupNorm(4, channels), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def mean_net(width):
    """A net that divides by its width: shapes nest, the function does not."""

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3), keepdim=True).flatten(1)

    return nn.Sequential(nn.Conv2d(3, int(8 * width), 3), nn.BatchNorm2d(int(8 * width)), Mean())


@pytest.mark.parametrize("build", [group_norm_net, mean_net])
def test_shapes_that_nest_are_not_enough(build):
    with pytest.raises(SliceError, match="the host's output differs by") as caught:
        SlimmableNet(build, host_width=2.0, slim_width=1.0)
    assert "with the channels outside the slim net switched off" in caught.value.problem


def test_grouped_convolutions_of_another_group_size_are_named():
    def build(width):
        channels = int(8 * width)
        return nn.Sequential(
            nn.Conv2d(3, channels, 1), nn.Conv2d(channels, channels, 3, groups=2), nn.Flatten()
        )

    with pytest.raises(SliceError, match="cannot slice"):
        SlimmableNet(build, host_width=2.0, slim_width=1.0)


@pytest.mark.parametrize(
    ("slim", "host", "text"),
    [
        ({"w": (4, 3)}, {"w": (2, 3)}, "cannot slice 'w' to (4, 3): the host has (2, 3)"),
        ({"w": (4, 3)}, {"w": (8, 2)}, "cannot slice 'w' to (4, 3): the host has (8, 2)"),
        ({"w": (4,)}, {"w": (4, 1)}, "cannot slice 'w' to (4,): the host has (4, 1)"),
        ({"w": (4,), "b": (1,)}, {"w": (4,)}, "'b' is in one width and not in the other (1 such tensors)"),
        ({"w": (4,)}, {"w": (4,), "b": (1,), "c": (1,)}, "'b' is in one width and not in the other (2"),
    ],
)
def test_shapes_that_do_not_nest_are_named(slim, host, text):
    slim, host = ({name: torch.Size(shape) for name, shape in each.items()} for each in (slim, host))
    with pytest.raises(SliceError) as caught:
        check_nesting(slim, host, slim_width=0.5, host_width=1.5)
    assert text in caught.value.problem
    assert caught.value.where == {"host width": "1.5", "slim width": "0.5"}


def test_the_check_of_function_leaves_statistics_and_mode_alone():
    net = slim_bare(SMALL)
    assert net.training
    assert net._skeleton[0].training
    assert all(int(tensor) == 0 for name, tensor in net.named_buffers() if "tracked" in name)
    assert all(float(tensor.abs().max()) == 0 for name, tensor in net.named_buffers() if "mean" in name)


def test_the_check_of_function_draws_from_no_shared_generator():
    build = partial(create_backbone, SMALL)
    torch.manual_seed(5)
    SlimmableNet(lambda width: build(width=width), host_width=1.5, slim_width=0.5)
    after = torch.rand(1)
    torch.manual_seed(5)
    build(width=1.5)
    assert torch.equal(after, torch.rand(1))
