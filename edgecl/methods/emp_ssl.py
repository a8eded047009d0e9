"""EMP-SSL's loss: many views of a picture share one direction, and the views of a batch fill all their dimensions.

Source: Tong, Chen, Ma, LeCun, "EMP-SSL: Towards Self-Supervised Learning in One Training Epoch", 2023, arXiv:2304.03977,
equation 5; projections are standardized over the batch, as everywhere in edgecl.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from edgecl.config.recipe import Panel, Recipe
from edgecl.config.views import ViewSpec
from edgecl.methods.losses import CodingRate, alignment_loss, correlation_of, mean_of
from edgecl.methods.method import Embeddings, Method, RatedConfig, Terms


class Config(RatedConfig):
    """L = mean over the views v of (2 - 2 cos(z_v, mean of all z) - w R(z_v)), R of whole views alone."""

    panels: ClassVar[tuple[Panel, ...]] = (
        Panel("Alignment", {"alignment": "2 - 2 cos"}, log=True),
        Panel("Coding rate", {"coding_rate": "R"}, unit="nats"),
    )

    label: ClassVar[str] = "EMP-SSL"
    name: Literal["emp-ssl"] = "emp-ssl"
    views: int = Field(4, ge=2, le=26)
    """Whole views of each picture; the first has view A's blur and solarization, all others view B's."""
    coding_rate: CodingRate = CodingRate(weight=0.1)

    def view_specs(self, recipe: Recipe) -> tuple[ViewSpec, ...]:
        """Return as many whole views as `views` says, and the local ones."""
        return recipe.views.specs(recipe.data.image_size, whole=self.views)

    def check(self, recipe: Recipe) -> None:
        """Refuse two widths, and alignment without the coding rate."""
        super().check(recipe)
        if self.coding_rate.weight == 0:
            raise ValueError(
                "'method.name' emp-ssl without 'method.coding_rate.weight' pulls every picture to one point"
            )


class EmpSsl(Method):
    """Views "view_0", "view_1" and on, and any local ones, each against the mean of all."""

    config: Config

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step; its terms are "alignment", "coding_rate", and those of the correlation."""
        views = list(embeddings.learnt.values())
        middle = torch.stack(views).mean(0)
        alignment = mean_of([alignment_loss(z, middle) for z in views])
        total, rate = self.less_rate(alignment, views[: self.whole_views], step)
        return total, {
            "alignment": alignment.detach(),
            "coding_rate": rate,
            **correlation_of(views[0], views[1]),
        }


METHOD = EmpSsl
