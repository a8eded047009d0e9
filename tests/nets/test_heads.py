"""Projector and encoder."""

import pytest
import torch
from torch import nn

from edgecl.nets.heads import Encoder, Projector


def test_projector_is_linear_norm_relu_and_ends_bare():
    projector = Projector(10, [6, 7, 4])
    kinds = [type(layer) for layer in projector]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [*hidden, *hidden, nn.Linear]
    assert [tuple(layer.weight.shape) for layer in projector if isinstance(layer, nn.Linear)] == [
        (6, 10),
        (7, 6),
        (4, 7),
    ]


def test_projector_has_no_bias_in_its_linear_layers():
    assert all(layer.bias is None for layer in Projector(10, [6, 4]) if isinstance(layer, nn.Linear))


def test_projector_of_one_size_is_one_linear_layer():
    assert [type(layer) for layer in Projector(10, [4])] == [nn.Linear]


@pytest.mark.parametrize("arch", ["mobilenetv3_small_100", "efficientnet_b0"])
def test_encoder_maps_images_to_projections(arch):
    with torch.device("meta"):
        encoder = Encoder(arch, width=1.5, projector=[16, 8], stem_stride=1)
        assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 8)
