"""DisCo: MoCo-v2 with each view's embedding pulled to what a frozen teacher makes of it.

Source: Gao et al., "DisCo: Remedying Self-supervised Learning on Lightweight Models with Distilled Contrastive Learning",
ECCV 2022, arXiv:2104.09124, equations 3 to 5. The teacher's pooled features stand in the place of its projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from edgecl.config.recipe import ForwardPasses, Panel, Recipe
from edgecl.config.settings import Fraction, Weight
from edgecl.methods.byol import prediction_loss
from edgecl.methods.losses import correlation_of, mean_of
from edgecl.methods.method import Embeddings, RunContext, Terms
from edgecl.methods.momentum import Follower, Queue, ask, rising_momentum
from edgecl.methods.teacher import TaughtConfig, TaughtMethod
from edgecl.nets.slimming import SlimmableNet


class Config(TaughtConfig):
    """L = mean over both views of InfoNCE of its query and the other's key, and w times |g(z) / |g(z)| - t / |t||^2."""

    panels: ClassVar[tuple[Panel, ...]] = (
        Panel(
            "Loss terms",
            {"loss": "total", "contrastive": "InfoNCE", "distillation": "distillation"},
            log=True,
        ),
    )

    label: ClassVar[str] = "DisCo"
    name: Literal["disco"] = "disco"
    weight: Weight = 1.0
    """w, of the distillation; the paper's."""
    temperature: float = Field(0.2, gt=0, le=100)
    """Of the softmax over cosines; the paper's."""
    momentum: Fraction = 0.95
    """Of the net that makes the keys, at the first step; it rises to 1."""
    queue_steps: int = Field(4, ge=1, le=100_000)
    """Of so many last steps the keys are kept; see moco-v2."""

    def forward_passes(self, recipe: Recipe) -> ForwardPasses:
        """Return the student's and the teacher's, and one of the net that makes the keys for each whole view."""
        return super().forward_passes(recipe).with_targets(self.count_views(recipe, local=False))


class Disco(TaughtMethod):
    """Its embeddings: queries "view_0", "view_1" and "local_0" and on, and guesses "guess_0" and "guess_1" of the teacher's
    features; targets "key_0", "key_1", "teacher_0" and "teacher_1"."""

    config: Config

    def __init__(self, config: Config, net: SlimmableNet, context: RunContext):
        super().__init__(config, net, context)
        self.target = Follower(net.host)
        self.queue = Queue(config.queue_steps * context.data.batch_size, context.dimensions)

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run the student."""
        queries = super().embed(self.own(views), step)
        guesses = {f"guess_{number}": self.adapter(queries[f"view_{number}"]) for number in range(2)}
        return {**queries, **guesses}

    def embed_targets(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run the net that follows, and the teacher."""
        features = self.features_of(views, 2)
        keys = {f"key_{number}": self.target(view) for number, view in enumerate(views[:2])}
        return {**keys, **{f"teacher_{number}": one for number, one in enumerate(features)}}

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step.

        Its terms are "contrastive", "distillation", and those of the correlation of the two whole views.
        """
        learnt, targets = embeddings
        queries = {name: z for name, z in learnt.items() if not name.startswith("guess")}
        contrastive = ask(queries, targets, self.queue, temperature=self.config.temperature)
        # Of unit vectors the squared distance is 2 - 2 cos.
        distillation = mean_of(
            [prediction_loss(learnt[f"guess_{number}"], targets[f"teacher_{number}"]) for number in range(2)]
        )
        total, rate = self.less_rate(
            contrastive + self.config.weight * distillation, [learnt["view_0"], learnt["view_1"]], step
        )
        self.queue.hold(targets["key_1"])
        return total, {
            "contrastive": contrastive.detach(),
            "distillation": distillation.detach(),
            "coding_rate": rate,
            **correlation_of(learnt["view_0"], learnt["view_1"]),
        }

    def after_step(self, step: int) -> None:
        """Move the net that makes the keys, and put the keys into the queue."""
        momentum = rising_momentum(self.config.momentum, step, total_steps=self.total_steps)
        self.target.follow(self.net.host, momentum=momentum)
        self.queue.push()


METHOD = Disco
