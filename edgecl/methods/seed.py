"""SEED: the student spreads its likeness to pictures of the last steps as a frozen teacher does.

Source: Fang et al., "SEED: Self-supervised Distillation For Visual Representation", ICLR 2021, arXiv:2101.04731,
equations 4 to 6. The teacher's pooled features stand in the place of its projections, so that any net can teach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from edgecl.config.recipe import Panel, Recipe
from edgecl.config.views import ViewSpec
from edgecl.methods.losses import check_pair, correlation_of, mean_of, mean_over_batch, wide
from edgecl.methods.method import Embeddings, RunContext, Terms
from edgecl.methods.momentum import Queue
from edgecl.methods.teacher import TaughtConfig, TaughtMethod
from edgecl.nets.slimming import SlimmableNet


class Config(TaughtConfig):
    """L = H(softmax(cos(t, .) / tau_t), softmax(cos(s, .) / tau_s)) over the picture's and the queue's t."""

    panels: ClassVar[tuple[Panel, ...]] = (Panel("Loss", {"loss": "cross-entropy"}, unit="nats", log=True),)

    label: ClassVar[str] = "SEED"
    name: Literal["seed"] = "seed"
    views: int = Field(1, ge=1, le=2)
    """Whole views of each picture, each of which student and teacher see."""
    student_temperature: float = Field(0.2, gt=0, le=100)
    """tau_s; the paper's."""
    teacher_temperature: float = Field(0.01, gt=0, le=100)
    """tau_t; the paper's."""
    queue: int = Field(4096, ge=1, le=1_000_000)
    """Features of earlier pictures; 65,536 in the paper."""

    def view_specs(self, recipe: Recipe) -> tuple[ViewSpec, ...]:
        """Return as many whole views as `views` says."""
        return self.with_plain(recipe, recipe.views.specs(recipe.data.image_size, whole=self.views))


class Seed(TaughtMethod):
    """Its embeddings: guesses "view_0" and on, "local_0" and on; targets, the teacher's features, "teacher_0" and on."""

    config: Config

    def __init__(self, config: Config, net: SlimmableNet, context: RunContext):
        super().__init__(config, net, context)
        self.queue = Queue(config.queue, self.teacher.features)

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Guess the teacher's features of each view; of a local one those of view 0."""
        return {name: self.adapter(z) for name, z in super().embed(self.own(views), step).items()}

    def embed_targets(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run the teacher."""
        features = self.features_of(views, self.whole_views)
        return {f"teacher_{number}": one for number, one in enumerate(features)}

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step; its terms are those of the correlation of a guess and the teacher's features."""
        config, (learnt, targets) = self.config, embeddings
        total = mean_of(
            [
                likeness_loss(
                    guess,
                    targets.get(name.replace("view", "teacher"), targets["teacher_0"]),
                    self.queue.rows,
                    student_temperature=config.student_temperature,
                    teacher_temperature=config.teacher_temperature,
                )
                for name, guess in learnt.items()
            ]
        )
        whole = [guess for name, guess in learnt.items() if name.startswith("view")]
        total, rate = self.less_rate(total, whole, step)
        self.queue.hold(targets["teacher_0"])
        return total, {"coding_rate": rate, **correlation_of(learnt["view_0"], targets["teacher_0"])}

    def after_step(self, step: int) -> None:
        """Put the teacher's features into the queue."""
        self.queue.push()


METHOD = Seed


def likeness_loss(
    guess: Tensor, taught: Tensor, queue: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Compare how alike a picture is to itself and to others, as the teacher sees it and as the student guesses.

    Args:
        guess: (N, F) the student's; any scale.
        taught: (N, F) the teacher's features of the same pictures; any scale.
        queue: (K, F) the teacher's of other pictures; any scale.
        student_temperature: of its softmax over cosines, > 0.
        teacher_temperature: of its softmax over cosines, > 0.

    Returns:
        () mean cross-entropy over the global batch, nats; float32 even under autocast.
    """
    check_pair(guess, taught)
    with torch.autocast(device_type=guess.device.type, enabled=False):
        s, t, others = (functional.normalize(wide(z), dim=1) for z in (guess, taught, queue))

        def likeness(z: Tensor) -> Tensor:
            return torch.cat([(z * t).sum(1, keepdim=True), z @ others.T], dim=1)

        aim = (likeness(t) / teacher_temperature).softmax(1)
        return mean_over_batch(-(aim * (likeness(s) / student_temperature).log_softmax(1)).sum(1))
