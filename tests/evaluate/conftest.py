"""Labelled pictures in memory, and a net small enough to train in a test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import COLORS

from edgecl.evaluate.labelled import Labelled, Part
from edgecl.storage.records import Preprocessing

PREPROCESSING = Preprocessing(image_size=8, resize_size=8, mean=[0.5] * 3, std=[0.25] * 3)


def colored_part(per_class: int, *, seed: int, noise: float = 25, side: int = 8) -> Part:
    """Noisy pictures of one color per class."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(COLORS)), per_class)
    colors = np.array(list(COLORS.values()))[labels][:, :, None, None]
    pixels = colors + random.normal(0, noise, (len(labels), 3, side, side))
    return Part(torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels))


class TinyNet(torch.nn.Module):
    """A backbone with a norm and timm's way of naming the classifier."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.num_classes = classes
        self.backbone = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )
        self.classifier = torch.nn.Linear(8, classes) if classes else torch.nn.Identity()

    def get_classifier(self) -> torch.nn.Module:
        return self.classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.backbone(images))


@pytest.fixture
def colored() -> Labelled:
    """12 pictures of each of 3 colors to learn from, 10 of each held out."""
    return Labelled(
        colored_part(12, seed=0),
        colored_part(10, seed=1),
        tuple(COLORS),
        train_from="drawn",
        test_from="drawn too",
    )


@pytest.fixture
def preprocessing() -> Preprocessing:
    return PREPROCESSING


@pytest.fixture
def tiny_net() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet()


@pytest.fixture
def tiny_backbone() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(classes=0)
