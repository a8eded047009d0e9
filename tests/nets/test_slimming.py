"""Slim nets are prefixes of their host, share all but their norms, and anything else is an error."""

import copy
from functools import partial

import pytest
import torch
from nets.conftest import slim_encoder
from torch import nn
from torch.func import functional_call

from edgecl.errors import SliceError
from edgecl.nets.backbone import count_parameters, create_backbone, is_norm
from edgecl.nets.heads import Encoder
from edgecl.nets.slimming import SlimmableNet

SMALL = "mobilenetv3_small_100"


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


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_equal_widths_are_one_net(width):
    net = SlimmableNet(lambda width: nn.Linear(3, int(4 * width)), host_width=width, slim_width=width)
    assert not net.has_slim
    assert len(net.slim_norms) == 0
    images = torch.randn(2, 3)
    assert torch.equal(net.forward_slim(images), net.forward_host(images))
    assert net.slim_tensors()["weight"] is net.host.weight


def test_blocks_are_copied_once_and_change_no_bit(net, images, monkeypatch):
    """Against plain indexing, whose views every convolution copies anew, there and back."""
    net.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    statistics = slim_statistics(net)

    def learn():
        with torch.autograd.profiler.profile() as seen:
            outputs = net.forward_slim(images)
            outputs.square().sum().backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        net.zero_grad()
        for name, tensor in net.slim_norms.named_buffers():
            tensor.copy_(statistics[name])
        return outputs, gradients, sum(event.name == "aten::copy_" for event in seen.function_events)

    outputs, gradients, copies = learn()
    monkeypatch.setattr(
        "edgecl.nets.slimming._dense_blocks",
        lambda whole, blocks: tuple(tensor[block] for tensor, block in zip(whole, blocks, strict=True)),
    )
    plain_outputs, plain_gradients, plain_copies = learn()
    assert torch.equal(outputs, plain_outputs)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain_gradients[name]), name
    assert copies < plain_copies


def slim_statistics(net):
    return {name: tensor.clone() for name, tensor in net.slim_norms.named_buffers()}


def test_parameters_are_the_hosts_and_the_private_norms_and_no_skeleton(net):
    skeleton = net._views[net.slim_width].skeleton
    norms = sum(count_parameters(module) for module in skeleton.modules() if is_norm(module))
    assert count_parameters(net) == count_parameters(net.host) + norms
    assert not any(parameter.is_meta for parameter in net.parameters())
    assert not any(buffer.is_meta for buffer in net.buffers())


def test_slim_norms_start_at_the_hosts_values():
    net = slim_bare("resnet50", slim_width=0.5)
    # Zero-initialized last norms of a residual block, and ones elsewhere.
    for name, module in net._views[net.slim_width].skeleton.named_modules():
        if is_norm(module):
            host = net.host.get_submodule(name)
            assert torch.equal(module.weight, host.weight[: len(module.weight)]), name
            assert torch.equal(module.bias, host.bias[: len(module.bias)]), name


def test_watched_slices_get_the_slim_passs_gradient_only(net, images):
    net.watched = {}
    (net.forward_host(images).sum() + net.forward_slim(images).square().sum()).backward()
    watched, net.watched = net.watched, None
    net.zero_grad()
    net.forward_slim(images).square().sum().backward()
    assert watched.keys() == net._views[net.slim_width].index.keys()
    host = dict(net.host.named_parameters())
    for name, gradient in watched.items():
        expected = host[name].grad[net._views[net.slim_width].index[name]]
        torch.testing.assert_close(
            gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max() + 1e-6)
        )


def test_nothing_is_watched_in_a_frozen_pass(net, images):
    net.watched = {}
    with net.frozen():
        net.forward_slim(images)
    assert net.watched == {}


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


def test_the_check_of_function_leaves_statistics_and_mode_alone():
    net = slim_bare(SMALL)
    assert net.training
    assert net._views[net.slim_width].skeleton.training
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


# --- several widths ---


@pytest.fixture(scope="module")
def untouched_many():
    """A host with three slim nets; tests take a copy, since building one is slow."""
    return slim_encoder(SMALL, 1.5, 1.0, 0.75, 0.5)


@pytest.fixture
def many(untouched_many):
    return copy.deepcopy(untouched_many)


def test_one_width_is_a_plain_slice_of_the_host_bit_for_bit(net, images):
    """The slim pass, its gradients and its statistics, against slicing written out here."""
    plain = copy.deepcopy(net)
    small = Encoder(SMALL, width=0.5, projector=[8, 4])
    host = dict(plain.host.named_parameters())
    tensors = {}
    for name, parameter in small.named_parameters():
        module, _, leaf = name.rpartition(".")
        if is_norm(small.get_submodule(module)):
            tensors[name] = plain.slim_norms[module.replace(".", "/")].get_parameter(leaf)
        else:
            tensors[name] = host[name][tuple(slice(0, size) for size in parameter.shape)]
    functional_call(small, tensors, (images,)).square().sum().backward()
    net.forward_slim(images).square().sum().backward()
    for (name, expected), found in zip(plain.named_parameters(), net.parameters(), strict=True):
        assert (expected.grad is None) == (found.grad is None), name
        assert expected.grad is None or torch.equal(expected.grad, found.grad), name
    for name, expected in small.named_buffers():
        if "running" in name:
            module, _, leaf = name.rpartition(".")
            norm = net.slim_norms[module.replace(".", "/")]
            # The small net's statistics began at their defaults and took the same one step.
            batch = expected - 0.9 * (1.0 if leaf == "running_var" else 0.0)
            before = plain.slim_norms[module.replace(".", "/")].get_buffer(leaf)
            torch.testing.assert_close(norm.get_buffer(leaf), 0.9 * before + batch, rtol=1e-5, atol=1e-6)


def test_names_at_one_width_are_those_of_checkpoints_before_there_were_several(net):
    tops = {name.partition(".")[0] for name in net.state_dict()}
    assert tops == {"host", "slim_norms"}
    assert "slim_norms.backbone/bn1.weight" in net.state_dict()
    assert net.slim_widths == (0.5,)


def test_names_and_start_of_the_slim_width_do_not_depend_on_the_others(many):
    alone = slim_encoder(SMALL, 1.5, 1.0)
    found = many.state_dict()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(found[name], tensor), name
    others = [name for name in found if name not in alone.state_dict()]
    assert {name.split(".")[1] for name in others} == {"0/75", "0/5"}
    assert all(name.startswith("other_norms.") for name in others)
    assert many.slim_widths == (1.0, 0.75, 0.5)


@pytest.mark.parametrize("width", [1.0, 0.75, 0.5])
def test_every_width_is_a_plain_net_with_its_tensors(many, images, width):
    plain = Encoder(SMALL, width=width, projector=[8, 4])
    plain.load_state_dict(
        {name: tensor.detach().clone() for name, tensor in many.slim_tensors(width).items()}
    )
    for mode in (True, False):
        plain.train(mode)
        many.train(mode)
        torch.testing.assert_close(many.forward_slim(images, width), plain(images), rtol=1e-4, atol=1e-5)
    backbone = many.forward_slim_part("backbone", images, width=width)
    torch.testing.assert_close(backbone, plain.backbone(images), rtol=1e-4, atol=1e-5)


def test_a_pass_of_one_width_leaves_the_statistics_of_all_others_alone(many, images):
    before = {name: tensor.clone() for name, tensor in many.named_buffers()}
    seen = set()
    for forward, prefix in (
        (lambda: many.forward_slim(images, 0.75), "other_norms.0/75."),
        (lambda: many.forward_slim(images), "slim_norms."),
        (lambda: many.forward_host(images), "host."),
    ):
        forward()
        changed = {name for name, tensor in many.named_buffers() if not torch.equal(tensor, before[name])}
        seen |= {name for name in before if name.startswith(prefix)}
        assert changed == seen
    assert len(seen) > 300


def test_a_pass_of_one_width_gives_gradient_to_its_own_norms_alone(many, images):
    many.forward_slim(images, 0.75).square().sum().backward()
    reached = {name for name, tensor in many.named_parameters() if tensor.grad is not None}
    norms = {name for name in reached if not name.startswith("host.")}
    assert norms == {name for name, _ in many.named_parameters() if name.startswith("other_norms.0/75.")}
    slices = many._views[0.75].index
    for name, parameter in many.host.named_parameters():
        if parameter.grad is not None:
            outside = parameter.grad.clone()
            outside[slices[name]] = 0
            assert torch.count_nonzero(outside) == 0, name


def test_frozen_passes_leave_the_statistics_of_every_width_alone(many, images):
    before = {name: tensor.clone() for name, tensor in many.named_buffers()}
    with many.frozen():
        for width in many.slim_widths:
            assert not many.forward_slim(images, width).requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in many.named_buffers())


def test_only_the_slim_width_is_watched(many, images):
    many.watched = {}
    many.forward_slim(images, 0.5).sum().backward()
    assert many.watched == {}
    many.forward_slim(images, 1.0).sum().backward()
    assert many.watched.keys() == many._views[1.0].index.keys()


def test_norms_of_a_width_are_its_own(many):
    assert many.norms_of() is many.slim_norms
    assert many.norms_of(1.0) is many.slim_norms
    assert many.norms_of(0.5) is many.other_norms["0/5"]
    assert len(SlimmableNet(lambda width: nn.Linear(3, 4), host_width=1, slim_width=1).norms_of()) == 0


def test_several_widths_survive_a_round_trip(many, images):
    with torch.no_grad():
        for parameter in many.parameters():
            parameter.add_(0.01)
    many.forward_slim(images, 0.5)
    other = slim_encoder(SMALL, 1.5, 1.0, 0.75, 0.5)
    other.load_state_dict(many.state_dict())
    for width in many.slim_widths:
        assert torch.equal(other.eval().forward_slim(images, width), many.eval().forward_slim(images, width))


def test_a_host_can_be_the_widest_of_several(images):
    net = slim_encoder(SMALL, 1.0, 1.0, 0.5)
    assert not net.has_slim
    net.eval()
    assert torch.equal(net.forward_slim(images), net.forward_host(images))
    assert not torch.allclose(net.forward_slim(images, 0.5), net.forward_host(images))
    assert net.slim_tensors(1.0)["backbone.conv_stem.weight"] is net.host.backbone.conv_stem.weight
    assert {name.partition(".")[0] for name in net.state_dict()} == {"host", "other_norms"}


def test_evaluation_mode_reaches_every_width(many):
    many.eval()
    assert not any(module.training for view in many._views.values() for module in view.skeleton.modules())
    many.train()
    assert all(module.training for view in many._views.values() for module in view.skeleton.modules())


def test_norms_are_mapped_once_each_under_their_names(many):
    seen = {}
    many.map_norms(lambda name, norm: seen.setdefault(name, norm))
    norms = [module for module in many.modules() if is_norm(module)]
    assert len(seen) == len(norms)
    assert seen["host.projector.1"] is many.host.projector[1]
    assert seen["slim_norms.projector.1"] is many.slim_norms["projector/1"]
    assert seen["other_norms.0.75.backbone.bn1"] is many.other_norms["0/75"]["backbone/bn1"]


def test_the_function_of_every_width_is_checked():
    """A net that is a slice at one of its widths and computes something else at another."""

    def plain(width):
        return nn.Sequential(nn.Conv2d(3, int(8 * width), 3), nn.BatchNorm2d(int(8 * width)), Odd(width))

    class Odd(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.factor = 3 if width == 0.5 else 1

        def forward(self, x):
            return self.factor * x.mean((2, 3))

    SlimmableNet(plain, host_width=2.0, slim_width=1.0, other_widths=(0.75,))
    with pytest.raises(SliceError, match="the host's output differs by") as caught:
        SlimmableNet(plain, host_width=2.0, slim_width=1.0, other_widths=(0.75, 0.5))
    assert caught.value.where == {"host width": "2", "slim width": "0.5"}
