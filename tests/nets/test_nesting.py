"""Each type of module has its rule; what is no part of its host is named."""

from functools import lru_cache
from itertools import combinations

import pytest
import torch
from torch import nn

from edgecl.errors import SliceError
from edgecl.nets import nesting
from edgecl.nets.catalogue import NETS
from edgecl.nets.heads import Encoder
from edgecl.nets.nesting import index_of
from edgecl.nets.slimming import SlimmableNet

WHERE = {"host width": "1.5", "slim width": "0.5"}


@lru_cache
def meta(arch, width):
    with torch.device("meta"):
        return Encoder(arch, width=width, projector=[16, 8])


@pytest.mark.parametrize("arch", NETS)
def test_nets_of_the_list_nest_at_widths_from_half_to_four(arch):
    for slim, host in combinations((0.5, 0.6, 0.75, 1.0, 1.5, 2.5, 4.0), 2):
        assert (
            index_of(meta(arch, slim), meta(arch, host), where=WHERE).keys()
            == meta(arch, slim).state_dict().keys()
        )


@pytest.mark.parametrize(
    ("slim", "host"),
    [
        (nn.Linear(3, 4), nn.Linear(5, 8)),
        (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 8, 3)),
        (nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8)),
        (nn.BatchNorm2d(4), nn.BatchNorm2d(8)),
        (nn.LayerNorm(8), nn.LayerNorm(8)),
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
        (nn.LayerNorm(4), nn.LayerNorm(8), "norm"),
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
