"""SimCLR: one encoder tells each picture's other view from all other views of the batch.

Source: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML
2020, arXiv:2002.05709. Local views: Caron et al. 2020 (SwAV), arXiv:2006.09882, section 3.2, "multi-crop".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from edgecl.config.recipe import ForwardPasses, MethodConfig, Panel, Recipe
from edgecl.methods.losses import CodingRate, contrastive_loss, correlation_of, mean_of
from edgecl.methods.method import Embeddings, Method, Terms


class Config(MethodConfig):
    """L = mean over the other views v of NT-Xent(z_A, z_v), less w R."""

    panels: ClassVar[tuple[Panel, ...]] = (
        Panel("Loss terms", {"loss": "total", "contrastive": "NT-Xent"}, unit="nats", log=True),
    )

    name: Literal["simclr"] = "simclr"
    temperature: float = Field(0.2, gt=0, le=100)
    """Of the softmax over cosines."""
    coding_rate: CodingRate = CodingRate()

    def arm(self, recipe: Recipe) -> str:
        """Name the method."""
        return "SimCLR"

    def check(self, recipe: Recipe) -> None:
        """Refuse the coding rate of two images, and two widths."""
        super().check(recipe)
        self.coding_rate.check(recipe)

    def forward_passes(self, recipe: Recipe) -> ForwardPasses:
        """Return those of one encoder; the coding rate is of the two whole views."""
        passes = super().forward_passes(recipe)
        return passes._replace(
            coding_rates=self.count_views(recipe, local=False) if self.coding_rate.weight else 0.0,
            coding_rate_share=self.coding_rate.until or 1.0,
        )


class SimClr(Method):
    """Views "view_0" and "view_1", and any local ones, each against "view_0"."""

    config: Config

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step; its terms are "contrastive", "coding_rate", and those of the correlation."""
        config = self.config
        z, *others = embeddings.learnt.values()
        contrastive = mean_of(
            [contrastive_loss(z, other, temperature=config.temperature) for other in others]
        )
        total, rate = config.coding_rate.take_off(
            contrastive, [[z, others[0]]], step, total_steps=self.total_steps
        )
        return total, {
            "contrastive": contrastive.detach(),
            "coding_rate": rate,
            **correlation_of(z, others[0]),
        }


METHOD = SimClr
