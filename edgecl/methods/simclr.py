"""SimCLR: one encoder tells each picture's other view from all other views of the batch.

Source: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML
2020, arXiv:2002.05709. Local views: Caron et al. 2020 (SwAV), arXiv:2006.09882, section 3.2, "multi-crop".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from edgecl.config.recipe import Panel
from edgecl.methods.losses import contrastive_loss
from edgecl.methods.method import RatedConfig
from edgecl.methods.pairs import PairMethod


class Config(RatedConfig):
    """L = mean over the other views v of NT-Xent(z_A, z_v), less w R."""

    panels: ClassVar[tuple[Panel, ...]] = (
        Panel("Loss terms", {"loss": "total", "contrastive": "NT-Xent"}, unit="nats", log=True),
    )

    label: ClassVar[str] = "SimCLR"
    name: Literal["simclr"] = "simclr"
    temperature: float = Field(0.2, gt=0, le=100)
    """Of the softmax over cosines; 0.2 is solo-learn's for CIFAR-10."""


class SimClr(PairMethod):
    """NT-Xent of view A with each other view."""

    config: Config
    term = "contrastive"

    def compare(self, z: Tensor, other: Tensor) -> Tensor:
        """Return NT-Xent of two views."""
        return contrastive_loss(z, other, temperature=self.config.temperature)


METHOD = SimClr
