"""BYOL: a predictor guesses what a slowly moving copy of the encoder makes of the other view.

Source: Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", NeurIPS 2020,
arXiv:2006.07733, equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from edgecl.config.recipe import ForwardPasses, Panel, Recipe
from edgecl.config.settings import Fraction
from edgecl.methods.losses import CodingRate, correlation_of, mean_of, mean_over_batch, wide
from edgecl.methods.method import Embeddings, Method, RatedConfig, RunContext, Terms
from edgecl.methods.momentum import Follower, rising_momentum
from edgecl.nets.heads import Projector
from edgecl.nets.slimming import SlimmableNet


class Config(RatedConfig):
    """L = mean over guesses q of one view and targets t of another whole view of 2 - 2 cos(q, t)."""

    panels: ClassVar[tuple[Panel, ...]] = (Panel("Loss", {"loss": "2 - 2 cos"}, log=True),)

    label: ClassVar[str] = "BYOL"
    name: Literal["byol"] = "byol"
    momentum: Fraction = 0.9
    """Of the target net at the first step; it rises to 1. The paper's is 0.996, solo-learn's for CIFAR-10 0.99: in a short
    run the targets would long be of the random start."""
    coding_rate: CodingRate = CodingRate(weight=0.01)
    """Of the projections, not of the guesses. A net that begins projects all pictures in almost one direction, and a guess
    that is always this one has nearly no loss: without the rate one seed of two did not start (docs/results.md)."""
    predictor: int = Field(512, ge=1, le=32_768)
    """Width of the predictor's hidden layer."""

    def forward_passes(self, recipe: Recipe) -> ForwardPasses:
        """Return those of the encoder, and one of the target net for each whole view."""
        return super().forward_passes(recipe).with_targets(self.count_views(recipe, local=False))


class Byol(Method):
    """Its embeddings: projections "view_0", "view_1", "local_0" and on, a guess of each; targets "target_0", "target_1"."""

    config: Config

    def __init__(self, config: Config, net: SlimmableNet, context: RunContext):
        super().__init__(config, net, context)
        dimensions = context.dimensions
        self.predictor = Projector(dimensions, [config.predictor, dimensions])
        self.target = Follower(net.host)

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Project each view, and guess from it the target of another."""
        projections = super().embed(views, step)
        guesses = {f"guess_{number}": self.predictor(z) for number, z in enumerate(projections.values())}
        return {**projections, **guesses}

    def embed_targets(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run the target net."""
        return {
            f"target_{number}": self.target(view) for number, view in enumerate(views[: self.whole_views])
        }

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step; its terms are those of the correlation of two projections."""
        learnt, targets = embeddings
        guesses = [z for name, z in learnt.items() if name.startswith("guess")]
        projections = [learnt["view_0"], learnt["view_1"]]
        total = mean_of(
            [
                prediction_loss(guess, target)
                for mine, guess in enumerate(guesses)
                for other, target in enumerate(targets.values())
                if mine != other
            ]
        )
        total, rate = self.less_rate(total, projections, step)
        return total, {"coding_rate": rate, **correlation_of(*projections)}

    def after_step(self, step: int) -> None:
        """Move the target net."""
        momentum = rising_momentum(self.config.momentum, step, total_steps=self.total_steps)
        self.target.follow(self.net.host, momentum=momentum)


METHOD = Byol


def prediction_loss(guess: Tensor, target: Tensor) -> Tensor:
    """Return the () mean of 2 - 2 cos of (N, D) guesses and targets over the global batch; float32 under autocast."""
    with torch.autocast(device_type=guess.device.type, enabled=False):
        return 2 - 2 * mean_over_batch(functional.cosine_similarity(wide(guess), wide(target), dim=1))
