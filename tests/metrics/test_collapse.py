"""Measures of features, on features whose quality is known."""

import math

import pytest
import torch
from torch import nn

from edgecl.metrics.collapse import extract_features, knn_top1, rank_me, spread


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_spread_of_equal_rows_is_zero():
    assert float(spread(normal(1, 16).expand(64, 16))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dimensions", [2, 16, 256])
def test_spread_of_an_even_sphere_is_one(dimensions):
    assert float(spread(1000 * normal(20_000, dimensions))) == pytest.approx(1, abs=0.02)


def test_spread_over_few_dimensions_is_low():
    z = normal(1000, 256)
    z[:, 2:] = 0
    assert float(spread(z)) < 0.1


def orthogonal(rows, columns, seed):
    return torch.linalg.qr(normal(rows, columns, seed=seed).double())[0]


@pytest.mark.parametrize("rank", [1, 5, 32])
def test_rank_of_equal_singular_values_is_their_number(rank):
    features = orthogonal(200, rank, 1) @ orthogonal(64, rank, 2).T
    assert rank_me(features) == pytest.approx(rank, rel=1e-3)


def test_rank_is_the_exponential_of_the_entropy():
    values = torch.tensor([8.0, 4.0, 2.0, 2.0], dtype=torch.float64)
    features = orthogonal(50, 4, 1) @ values.diag() @ orthogonal(4, 4, 2).T
    entropy = -sum(p * math.log(p) for p in (0.5, 0.25, 0.125, 0.125))
    assert rank_me(features) == pytest.approx(math.exp(entropy), rel=1e-4)


def clusters(count, seed, noise=0.2):
    centers = torch.eye(4, 16) * 3
    labels = torch.arange(count) % 4
    return centers[labels] + noise * normal(count, 16, seed=seed), labels


def test_neighbors_of_noise_are_chance():
    bank, queries = normal(2000, 16, seed=1), normal(4000, 16, seed=2)
    found = knn_top1(bank, torch.arange(2000) % 4, queries, torch.arange(4000) % 4)
    assert found == pytest.approx(25, abs=3)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
def test_neighbors_tell_clusters_apart_and_are_sought_on_the_sphere(scale):
    bank, labels = clusters(200, 1)
    assert knn_top1(bank * scale, labels, *clusters(100, 2)) == 100


def test_the_nearer_neighbor_weighs_more():
    bank = torch.tensor([[1.0, 0.0]] + [[0.0, 1.0]] * 5)
    labels = torch.tensor([0] + [1] * 5)
    assert knn_top1(bank, labels, torch.tensor([[1.0, 0.2]]), torch.tensor([0])) == 100


def test_few_in_the_bank_are_enough():
    assert knn_top1(*clusters(4, 1, noise=0), *clusters(100, 2)) == 100


def test_features_come_in_order_and_in_evaluation_mode():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten())
    images = torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8)
    before = net[1].running_mean.clone()
    found = extract_features(net, images, normalize=lambda part: part.float() / 255, batch=3)
    assert net.training
    assert torch.equal(net[1].running_mean, before)
    with torch.no_grad():
        torch.testing.assert_close(found, net.eval()(images.float() / 255))
    assert not found.requires_grad
