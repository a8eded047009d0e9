"""What sits on the features while training: the projector, and backbone and projector as one encoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from edgecl.nets.backbone import activate_beside_input, create_backbone, feature_count
from edgecl.nets.small_maps import speed_up_small_maps


class Projector(nn.Sequential):
    """Map features to the space of the loss: linear layers with batch norm and ReLU between them.

    Args:
        features: F, length of a feature vector.
        sizes: width of each linear layer; the last is D.

    Source: Zbontar et al. 2021, arXiv:2103.03230, section 2.2: no norm and no bias after the last layer.
    """

    def __init__(self, features: int, sizes: Sequence[int]):
        layers: list[nn.Module] = []
        for size in sizes[:-1]:
            layers += [nn.Linear(features, size, bias=False), nn.BatchNorm1d(size), nn.ReLU(inplace=True)]
            features = size
        super().__init__(*layers, nn.Linear(features, sizes[-1], bias=False))


class Encoder(nn.Module):
    """Backbone and projector as one net, so that one rule slims both."""

    def __init__(self, arch: str, *, width: float, projector: Sequence[int], stem_stride: int | None = None):
        super().__init__()
        self.backbone = create_backbone(arch, width=width, stem_stride=stem_stride)
        activate_beside_input(self.backbone)
        speed_up_small_maps(self.backbone)
        self.projector = Projector(feature_count(self.backbone), projector)

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, D) projections of (N, 3, H, W) images."""
        projections: Tensor = self.projector(self.backbone(images))
        return projections
