"""What methods share that compare view A with every other view through one encoder."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from edgecl.config.recipe import ForwardPasses, MethodConfig, Recipe
from edgecl.methods.losses import CodingRate, correlation_of, mean_of
from edgecl.methods.method import Embeddings, Method, Terms


class PairConfig(MethodConfig):
    """L = mean over the other views v of compare(z_A, z_v), less w R of the two whole views."""

    coding_rate: CodingRate = CodingRate()

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


class PairMethod(Method):
    """Views "view_0" and "view_1", and any local ones, each against "view_0"."""

    config: PairConfig
    term: ClassVar[str]
    """What `compare` is logged as."""

    def compare(self, z: Tensor, other: Tensor) -> Tensor:
        """Return the () loss between (N, D) projections of the same images."""
        raise NotImplementedError

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step; its terms are `term`, "coding_rate", and those of the correlation."""
        z, *others = embeddings.learnt.values()
        compared = mean_of([self.compare(z, other) for other in others])
        total, rate = self.config.coding_rate.take_off(
            compared, [[z, others[0]]], step, total_steps=self.total_steps
        )
        return total, {
            self.term: compared.detach(),
            "coding_rate": rate,
            **correlation_of(z, others[0]),
        }
