"""Barlow Twins: the dimensions of two views correlate each with itself and with no other.

Source: Zbontar, Jing, Misra, LeCun, Deny, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021,
arXiv:2103.03230.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from edgecl.config.recipe import Panel
from edgecl.config.settings import Factor, Weight
from edgecl.methods.losses import cross_correlation_loss
from edgecl.methods.method import RatedConfig
from edgecl.methods.pairs import PairMethod


class Config(RatedConfig):
    """L = mean over the other views v of s (sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2), C of z_A and z_v, less w R."""

    panels: ClassVar[tuple[Panel, ...]] = (
        Panel("Loss terms", {"loss": "total", "cross_correlation": "Barlow Twins"}, log=True),
    )

    label: ClassVar[str] = "Barlow Twins"
    name: Literal["barlow-twins"] = "barlow-twins"
    off_diagonal: Weight = 0.0051
    """lambda, the weight of the redundancy term; 1 / D suits small projectors."""
    scale: Factor = 0.1
    """s; solo-learn's for CIFAR-10."""


class BarlowTwins(PairMethod):
    """The correlation of view A with each other view."""

    config: Config
    term = "cross_correlation"

    def compare(self, z: Tensor, other: Tensor) -> Tensor:
        """Return Barlow Twins' loss of two views."""
        return (
            self.config.scale * cross_correlation_loss(z, other, off_diagonal=self.config.off_diagonal).total
        )


METHOD = BarlowTwins
