"""Which pictures come first: typical of planted groups, none twice, none that is alone."""

from __future__ import annotations

import pytest
import torch

from edgecl.metrics import diversity
from edgecl.metrics.diversity import clusters, isolation, outliers, typical_first

SIZES = (60, 30, 15, 8)


@pytest.fixture(scope="module")
def planted():
    """Features of four tight groups in orthogonal directions, and which group each is of."""
    random = torch.Generator().manual_seed(0)
    group = torch.repeat_interleave(torch.arange(4), torch.tensor(SIZES))
    features = torch.eye(16)[group] + 0.005 * torch.randn(len(group), 16, generator=random)
    order = torch.randperm(len(group), generator=random)
    return features[order], group[order]


def test_planted_groups_are_found_whatever_they_begin_with(planted):
    features, group = planted
    for seed in range(5):
        found = clusters(features, 4, seed=seed)
        pairs = {(int(a), int(b)) for a, b in zip(found, group, strict=True)}
        assert len(pairs) == 4, seed


def test_as_many_groups_as_pictures_are_the_pictures(planted):
    features, _ = planted
    assert len(clusters(features, len(features), seed=1).unique()) == len(features)


def test_isolation_is_the_mean_distance_to_the_nearest_others(planted, monkeypatch):
    features, _ = planted
    monkeypatch.setattr(diversity, "_CHUNK", 7)
    monkeypatch.setattr(diversity, "_NEIGHBORS", 3)
    expected = [
        sum(sorted(float((one - other).norm()) for place, other in enumerate(features) if place != row)[:3])
        / 3
        for row, one in enumerate(features)
    ]
    assert isolation(features).tolist() == pytest.approx(expected, rel=1e-2)


def test_first_comes_a_typical_picture_of_every_group_the_largest_first(planted):
    features, group = planted
    lonely = isolation(features)
    order = typical_first(group, lonely)
    assert sorted(order.tolist()) == list(range(len(features)))
    assert group[order[:8]].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    for one in range(4):
        members = (group == one).nonzero()[:, 0]
        ranked = [row for row in order.tolist() if group[row] == one]
        assert ranked == sorted(members.tolist(), key=lambda row: float(lonely[row]))


def test_pictures_unlike_any_other_are_named_the_least_like_first(planted):
    features, _ = planted
    odd = torch.zeros(2, 16)
    odd[0, 14], odd[1, 15] = 3.0, 5.0
    lonely = isolation(torch.cat([features, odd]))
    count = len(features)
    assert outliers(lonely, most=2) == [count + 1, count]
    assert outliers(lonely, most=1) == [count + 1]
    assert outliers(torch.linspace(1, 2, 50), most=10) == []
