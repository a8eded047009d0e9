"""VICReg: views agree, every dimension varies, and no two vary together.

Source: Bardes, Ponce, LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR
2022, arXiv:2105.04906, equations 1 to 6.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from edgecl.config.recipe import Panel
from edgecl.config.settings import Weight
from edgecl.methods.losses import check_pair, global_covariance, mean_over_batch, wide
from edgecl.methods.method import RatedConfig
from edgecl.methods.pairs import PairMethod

_EPSILON = 1e-4


class Config(RatedConfig):
    """L = mean over the other views v of lambda s(z_A, z_v) + mu (v(z_A) + v(z_v)) / 2 + nu (c(z_A) + c(z_v)), less w R."""

    panels: ClassVar[tuple[Panel, ...]] = (
        Panel("Loss terms", {"loss": "total", "vicreg": "VICReg"}, log=True),
    )

    label: ClassVar[str] = "VICReg"
    name: Literal["vicreg"] = "vicreg"
    invariance: Weight = 25.0
    """lambda, of the mean squared distance of two views."""
    variance: Weight = 25.0
    """mu, of how far standard deviations fall short of 1."""
    covariance: Weight = 1.0
    """nu, of the squared covariances."""


class VicReg(PairMethod):
    """VICReg's loss of view A and each other view."""

    config: Config
    term = "vicreg"

    def compare(self, z: Tensor, other: Tensor) -> Tensor:
        """Return VICReg's loss of two views."""
        config = self.config
        return vicreg_loss(
            z, other, invariance=config.invariance, variance=config.variance, covariance=config.covariance
        )


METHOD = VicReg


def vicreg_loss(z_a: Tensor, z_b: Tensor, *, invariance: float, variance: float, covariance: float) -> Tensor:
    """Pull two views together, and keep every dimension spread and apart from the others.

    Args:
        z_a: (N, D) projections of view A; their scale matters.
        z_b: (N, D) projections of view B; same dtype and device as z_a.
        invariance: weight of the mean squared distance, over samples and dimensions.
        variance: weight of mean_j max(0, 1 - sqrt(Var(z_j) + 1e-4)), the mean of the two views.
        covariance: weight of sum_{i != j} Cov(z)_ij^2 / D, the sum of the two views.

    Returns:
        () loss of the global batch; float32 even under autocast.

    Source: the paper's equation 6, with the public code's mean over the two views in the variance term.
    """
    check_pair(z_a, z_b)
    with torch.autocast(device_type=z_a.device.type, enabled=False):
        a, b = wide(z_a), wide(z_b)
        loss = invariance * mean_over_batch((a - b).square().mean(1))
        for z in (a, b):
            found = global_covariance(z)
            variances = found.diagonal()
            short = (1 - (variances + _EPSILON).sqrt()).clamp(min=0).mean()
            apart = (found.square().sum() - variances.square().sum()) / len(variances)
            loss = loss + variance * short / 2 + covariance * apart
        return loss
