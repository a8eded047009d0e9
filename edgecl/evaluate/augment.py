"""What fine-tuning does to labelled pictures beyond crop, flip and color: RandAugment, mixup, cutmix; torchvision's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from edgecl.data.randomness import random_uint64

_MAGNITUDES = 31
"""RandAugment's scale, 0 to 30."""


def rand_augmented(
    images: Tensor, indices: NDArray[np.int64], *, magnitude: int, seed: int, epoch: int
) -> Tensor:
    """Change each image by two random operations: a function of (seed, epoch, index) alone.

    Args:
        images: (N, 3, H, W) float32 in 0..1.
        magnitude: of the operations, 0 to 30.

    Source: Cubuk et al. 2019 (RandAugment), arXiv:1909.13719.
    """
    augment = v2.RandAugment(num_ops=2, magnitude=magnitude, num_magnitude_bins=_MAGNITUDES)
    numbers = random_uint64(seed, epoch, indices, stream="rand-augment", count=1)[:, 0]
    changed = []
    for image, number in zip(images, numbers, strict=True):
        with _drawing_from(number):
            changed.append(augment(image))
    return torch.stack(changed)


def mixed(
    images: Tensor, labels: Tensor, *, classes: int, mixup: float, cutmix: float, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with another one, by mixup or by cutmix: a function of (seed, step) alone.

    Args:
        images: (N, 3, H, W) float32.
        labels: (N,) int64.
        mixup: alpha of the Beta distribution of the shares; 0 never blends two images.
        cutmix: the same, of the area; 0 never pastes a part of one into another.

    Returns:
        the images, and (N, K) shares of the classes in each.

    Source: Zhang et al. 2017 (mixup), arXiv:1710.09412; Yun et al. 2019 (CutMix), arXiv:1905.04899. Where both are
    asked for, each batch takes one by the toss of a coin, as timm does.
    """
    ways: list[v2.Transform] = []
    if mixup:
        ways.append(v2.MixUp(alpha=mixup, num_classes=classes))
    if cutmix:
        ways.append(v2.CutMix(alpha=cutmix, num_classes=classes))
    with _drawing_from(random_uint64(seed, step, np.zeros(1, np.int64), stream="mix", count=1)[0, 0]):
        found: tuple[Tensor, Tensor] = v2.RandomChoice(ways)(images, labels)
    return found


@contextmanager
def _drawing_from(number: np.uint64) -> Iterator[None]:
    """Let torch draw from a seed of its own, and nothing else notice."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(number >> np.uint64(1)))
        yield
