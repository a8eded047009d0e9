"""A net small enough to reason about: one convolution, one norm, one hidden layer, at any width."""

import pytest
import torch
from torch import nn

from edgecl.nets.slimming import SlimmableNet

DIMENSIONS = 6


def tiny_net(width):
    channels = int(8 * width)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, channels, bias=False),
        nn.BatchNorm1d(channels),
        nn.ReLU(),
        nn.Linear(channels, DIMENSIONS),
    )


@pytest.fixture
def make_net():
    """Make a tiny host with slim nets inside."""

    def make(*, host_width=2.0, slim_width=1.0, other_widths=()):
        torch.manual_seed(0)
        return SlimmableNet(tiny_net, host_width=host_width, slim_width=slim_width, other_widths=other_widths)

    return make


@pytest.fixture
def views():
    """Give two different views of 16 images."""
    generator = torch.Generator().manual_seed(1)
    view_a = torch.randn(16, 3, 12, 12, generator=generator)
    return view_a, view_a + 0.5 * torch.randn(view_a.shape, generator=generator)
