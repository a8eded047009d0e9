"""Which of many pictures to look at first, by their features: typical ones, far from each other; and the unlike ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgecl.metrics.linear import place_in_class

_NEIGHBORS = 20
# Among so many others neighbors are looked for: all pairs of a million would be a trillion.
_REFERENCES = 5_000
_ROUNDS = 30
_CHUNK = 4096


def isolation(features: Tensor) -> Tensor:
    """Return the (N,) mean distances of (N, F) features, N >= 2, to the 20 nearest of 5,000 others, evenly spread."""
    among = torch.linspace(0, len(features) - 1, min(len(features), _REFERENCES)).long()
    neighbors = min(_NEIGHBORS, len(among) - 1)
    found = []
    for start in range(0, len(features), _CHUNK):
        part = features[start : start + _CHUNK]
        distance = torch.cdist(part, features[among])
        own = among[None] == torch.arange(start, start + len(part))[:, None]
        found.append(
            distance.masked_fill_(own, torch.inf).topk(neighbors, dim=1, largest=False).values.mean(1)
        )
    return torch.cat(found)


def clusters(features: Tensor, count: int, *, seed: int) -> Tensor:
    """Part pictures into groups that are alike, by k-means on the sphere.

    Args:
        features: (N, F).
        count: of groups, 1 <= count <= N.

    Returns:
        (N,) int64, the group of each, below count; a group may be empty.

    Source: Arthur and Vassilvitskii 2007, "k-means++", for where the groups begin.
    """
    unit = functional.normalize(features, dim=1)
    random = torch.Generator().manual_seed(seed)
    begun = [int(torch.randint(len(unit), (1,), generator=random))]
    distance = torch.full((len(unit),), torch.inf)
    while len(begun) < count:
        distance = torch.minimum(distance, (2 - 2 * unit @ unit[begun[-1]]).clamp(min=0))
        # A place in a running sum; torch.multinomial takes 2^24 of them at most.
        sums = distance.double().cumsum(0)
        drawn = torch.rand(1, generator=random, dtype=torch.float64) * sums[-1]
        begun.append(min(int(torch.searchsorted(sums, drawn)), len(unit) - 1))
    centers = unit[begun]
    group = _nearest(unit, centers)
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(centers).index_add_(0, group, unit)
        sizes = torch.bincount(group, minlength=count)[:, None]
        centers = torch.where(sizes > 0, sums / sizes.clamp(min=1), centers)
        before, group = group, _nearest(unit, centers)
        if torch.equal(before, group):
            break
    return group


def _nearest(unit: Tensor, centers: Tensor) -> Tensor:
    offset = centers.square().sum(1) / 2
    return torch.cat([(part @ centers.T - offset).argmax(1) for part in unit.split(_CHUNK)])


def typical_first(group: Tensor, isolation: Tensor) -> Tensor:
    """Order pictures so that the first so many of them are typical and far from each other.

    Returns:
        (N,) the least isolated picture of every group, the largest group's first; then every group's second, and so on.

    Source: Hacohen, Dekel, Weinshall 2022 (TypiClust), arXiv:2202.02794, section 3; there neighbors are of the same group.
    """
    dense = isolation.argsort(stable=True).numpy()
    size = torch.bincount(group)[group].numpy()
    place = place_in_class(group.numpy()[dense])
    return torch.from_numpy(dense[np.lexsort((-size[dense], place))])


def outliers(isolation: Tensor, *, most: int) -> list[int]:
    """Return the pictures that are least like any other, the least like first: three robust deviations above the median."""
    median = isolation.median()
    deviation = 1.4826 * (isolation - median).abs().median()
    order = isolation.argsort(descending=True)[:most]
    return [int(index) for index in order if isolation[index] > median + 3 * deviation]
