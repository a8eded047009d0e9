"""Each type of module has its rule; what is no part of its host is named."""

from functools import lru_cache
from itertools import combinations

import pytest
import torch
from every_net import WIDTHS, every_net
from timm.layers import Attention, LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from edgecl.errors import SliceError
from edgecl.nets import nesting
from edgecl.nets.heads import Encoder
from edgecl.nets.nesting import index_of
from edgecl.nets.slimming import SlimmableNet

WHERE = {"host width": "1.5", "slim width": "0.5"}


@lru_cache
def meta(arch, width):
    with torch.device("meta"):
        return Encoder(arch, width=width, projector=[16, 8])


@pytest.mark.parametrize("arch", every_net())
def test_nets_of_the_list_nest_at_widths_from_half_to_four(arch):
    least, most = WIDTHS.get(arch, (0.0, 4.0))
    widths = [width for width in (0.5, 0.6, 0.75, 1.0, 1.5, 2.5, 4.0) if least <= width <= most]
    for slim, host in combinations(widths, 2):
        index = index_of(meta(arch, slim), meta(arch, host), where=WHERE)
        assert index.keys() >= meta(arch, slim).state_dict().keys()


@pytest.mark.parametrize(
    ("slim", "host"),
    [
        (nn.Linear(3, 4), nn.Linear(5, 8)),
        (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 8, 3)),
        (nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8)),
        (nn.BatchNorm2d(4), nn.BatchNorm2d(8)),
        (nn.LayerNorm(4), nn.LayerNorm(8)),
    ],
    ids=lambda layer: str(layer),
)
def test_a_layer_that_nests_is_the_leading_block(slim, host):
    index = index_of(slim, host, where=WHERE)
    assert index.keys() == slim.state_dict().keys()
    for name, tensor in slim.state_dict().items():
        block = host.state_dict()[name]
        for dimension, size in enumerate(tensor.shape):
            block = block.narrow(dimension, 0, size)
        assert torch.equal(host.state_dict()[name][index[name]], block)


@pytest.mark.parametrize(
    ("slim", "host", "word"),
    [
        (nn.Linear(3, 4), nn.Linear(3, 2), "host has"),
        (nn.Linear(3, 4), nn.Linear(2, 4), "host has"),
        (nn.Linear(3, 4), nn.Conv2d(3, 4, 1), "host has"),
        (nn.Linear(3, 4), nn.Linear(3, 4, bias=False), "in one width"),
        (nn.Linear(3, 4, bias=False), nn.Linear(3, 4), "in one width"),
        (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(8, 8, 3, groups=2), "groups"),
        (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(8, 8, 3, groups=4), "groups"),
        (nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3), "groups"),
        (nn.GroupNorm(2, 4), nn.GroupNorm(2, 8), "norm"),
        (LayerNorm2d(4), LayerNorm2d(8), "norm"),
    ],
    ids=lambda layer: str(layer),
)
def test_a_layer_that_does_not_nest_is_named(slim, host, word):
    with pytest.raises(SliceError, match=word) as caught:
        index_of(nn.Sequential(slim), nn.Sequential(host), where=WHERE)
    assert "'0" in caught.value.problem
    assert caught.value.where == WHERE


class Fused(nn.Linear):
    """Two layers in one matrix, as attention's query, key and value are: the slim rows lie apart in the host."""

    def forward(self, x):
        left, right = super().forward(x).chunk(2, dim=1)
        return left * right


def fused_net(width):
    stem = nn.Conv2d(3, int(8 * width), 3)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(stem, pool, Fused(int(8 * width), 2 * int(4 * width)))


def fused(slim, host):
    half, whole = slim.out_features // 2, host.out_features // 2
    rows = torch.cat([torch.arange(half), whole + torch.arange(half)])
    return {"weight": (rows, slice(0, slim.in_features)), "bias": (rows,)}


def test_a_layer_whose_rows_lie_apart_needs_a_rule_and_no_more(monkeypatch):
    """Passes, gradients and a nested start follow from the index."""
    with pytest.raises(SliceError, match="output differs"):
        SlimmableNet(fused_net, host_width=2.0, slim_width=1.0)
    monkeypatch.setattr(nesting, "RULES", [(Fused, fused), *nesting.RULES])
    net = SlimmableNet(fused_net, host_width=2.0, slim_width=1.0)
    net.nest()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = fused_net(1.0)
    plain.load_state_dict({name: tensor.detach() for name, tensor in net.slim_tensors().items()})
    torch.testing.assert_close(net.forward_slim(images), plain(images))
    torch.testing.assert_close(net.forward_host(images)[:, :4], plain(images))
    net.forward_slim(images).square().sum().backward()
    plain(images).square().sum().backward()
    weight, expected = net.host[2].weight, plain[2].weight.grad
    torch.testing.assert_close(weight.grad[[0, 1, 2, 3, 8, 9, 10, 11], :8], expected)
    assert torch.count_nonzero(weight.grad) == torch.count_nonzero(expected)


def attention_pair(heads=2, host_heads=3, head=4):
    torch.manual_seed(0)
    return [Attention(count * head, num_heads=count, qkv_bias=True) for count in (heads, host_heads)]


def test_attention_nests_by_heads():
    """The slim net's heads compute what they compute among the host's."""
    slim, host = attention_pair()
    index = index_of(slim, host, where=WHERE)
    assert index["qkv.weight"][0].tolist() == [*range(8), *range(12, 20), *range(24, 32)]
    tokens = torch.randn(2, 5, 8)
    with torch.no_grad():
        slim.load_state_dict({name: host.state_dict()[name][block] for name, block in index.items()})
        # What the host's last head adds is switched off where it joins the others.
        host.proj.weight[:, 8:] = 0
        found = host(torch.nn.functional.pad(tokens, (0, 4)))[..., :8]
        torch.testing.assert_close(found, slim(tokens))


def test_heads_of_another_width_are_named():
    with pytest.raises(SliceError, match="heads of 4 channels") as caught:
        index_of(Attention(8, num_heads=2), Attention(16, num_heads=2), where=WHERE)
    assert caught.value.where == WHERE


def vit(width):
    return VisionTransformer(
        img_size=32,
        patch_size=16,
        embed_dim=int(8 * width),
        depth=2,
        num_heads=int(2 * width),
        num_classes=0,
    )


def test_a_transformer_nests_by_its_rule_and_not_as_leading_blocks(monkeypatch):
    monkeypatch.setattr(nesting, "example_side", lambda net: 32)
    SlimmableNet(vit, host_width=2.0, slim_width=1.0)
    monkeypatch.setattr(nesting, "RULES", [rule for rule in nesting.RULES if rule[0] is not Attention])
    with pytest.raises(SliceError, match="output differs"):
        SlimmableNet(vit, host_width=2.0, slim_width=1.0)


def test_layer_norms_are_the_slim_nets_own(monkeypatch):
    monkeypatch.setattr(nesting, "example_side", lambda net: 32)
    net = SlimmableNet(vit, host_width=2.0, slim_width=1.0)
    assert set(net.norms_of()) == {
        "norm",
        *(f"blocks/{block}/norm{one}" for block in (0, 1) for one in (1, 2)),
    }
    with torch.no_grad():
        net.slim_norms["norm"].bias.fill_(7)
    images = torch.randn(2, 3, 32, 32)
    # Of the slim net's eight channels, not of the host's sixteen: their mean is that of the norm's bias.
    torch.testing.assert_close(net.forward_slim(images).mean(1), torch.full((2,), 7.0))
    assert not net.host.norm.bias.any()


def test_a_host_with_wider_layer_norms_cannot_begin_as_its_slim_net(monkeypatch):
    monkeypatch.setattr(nesting, "example_side", lambda net: 32)
    net = SlimmableNet(vit, host_width=2.0, slim_width=1.0)
    with pytest.raises(SliceError, match=r"'blocks\.0\.norm1'") as caught:
        net.nest()
    assert "nested_start = false" in caught.value.hint


class Scaled(nn.Module):
    """Channels times a buffer that no state dict holds."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.register_buffer("factors", torch.arange(1.0, channels + 1).view(-1, 1, 1), persistent=False)

    def forward(self, images):
        return (self.conv(images) * self.factors).mean((2, 3))


def test_buffers_that_are_not_saved_come_from_the_host():
    net = SlimmableNet(lambda width: Scaled(int(4 * width)), host_width=2.0, slim_width=1.0)
    plain = Scaled(4)
    tensors = net.slim_tensors()
    plain.load_state_dict({name: tensors[name].detach() for name in plain.state_dict()})
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(net.forward_slim(images), plain(images))


class Faint(nn.Module):
    """A branch that changes with the width, behind a factor that begins almost at zero."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.factor = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, images):
        features = self.conv(images).mean((2, 3))
        return features + self.factor * features.flip(1)


def test_what_begins_almost_at_zero_hides_nothing():
    with pytest.raises(SliceError, match="output differs"):
        SlimmableNet(lambda width: Faint(int(4 * width)), host_width=2.0, slim_width=1.0)
