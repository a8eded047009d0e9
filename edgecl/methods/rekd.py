"""ReKD: MoCo-v2 whose positives are also the pictures of the last steps that a teacher finds alike.

Source: Zheng, Wang, Yuan, "Boosting Contrastive Learning with Relation Knowledge Distillation", AAAI 2022,
arXiv:2112.04174, its relation-wise contrast with semantic positives of a heterogeneous teacher. As we read its published
abstract and introduction; the paper's teacher learns beside the student, ours is frozen, and alike are the `neighbors`
pictures with the largest cosine of the teacher's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from edgecl.config.recipe import ForwardPasses, Panel, Recipe
from edgecl.config.settings import Fraction, Weight
from edgecl.methods.losses import correlation_of, mean_of, mean_over_batch, wide
from edgecl.methods.method import Embeddings, RunContext, Terms
from edgecl.methods.momentum import Follower, Queue, ask, rising_momentum
from edgecl.methods.teacher import TaughtConfig, TaughtMethod
from edgecl.nets.slimming import SlimmableNet


class Config(TaughtConfig):
    """L = InfoNCE(query, key) + w times the mean over the neighbors p of -log softmax_queue(cos(query, .) / tau)_p."""

    panels: ClassVar[tuple[Panel, ...]] = (
        Panel(
            "Loss terms",
            {"loss": "total", "contrastive": "InfoNCE", "relation": "relation"},
            unit="nats",
            log=True,
        ),
    )

    label: ClassVar[str] = "ReKD"
    name: Literal["rekd"] = "rekd"
    weight: Weight = 1.0
    """w, of the relation."""
    neighbors: int = Field(5, ge=1, le=100_000)
    """How many pictures of the queue are alike."""
    temperature: float = Field(0.2, gt=0, le=100)
    """tau, of the softmax over cosines."""
    momentum: Fraction = 0.95
    """Of the net that makes the keys, at the first step; it rises to 1."""
    queue_steps: int = Field(4, ge=1, le=100_000)
    """Of so many last steps the keys are kept, and the teacher's features of the same pictures; see moco-v2."""

    def check(self, recipe: Recipe) -> None:
        """Refuse more neighbors than there are pictures to choose from."""
        super().check(recipe)
        kept = self.queue_steps * recipe.data.batch_size
        if self.neighbors > kept:
            raise ValueError(
                f"'method.neighbors' {self.neighbors} is above the {kept} pictures that 'method.queue_steps' keeps"
            )

    def rated_views(self, recipe: Recipe) -> int:
        """Return 1: view A asks."""
        return 1

    def taught_views(self, recipe: Recipe) -> int:
        """Return 1: the teacher sees view A."""
        return 1

    def forward_passes(self, recipe: Recipe) -> ForwardPasses:
        """Return a learning pass of view A, one without gradient of view B, and the teacher's."""
        passes = super().forward_passes(recipe)
        return passes._replace(whole={recipe.host.width: 3.0}).with_targets(1)


class Rekd(TaughtMethod):
    """Its embeddings: queries "view_0", and "local_0" and on; targets "key_1", and the teacher's features "teacher_0"."""

    config: Config

    def __init__(self, config: Config, net: SlimmableNet, context: RunContext):
        super().__init__(config, net, context)
        del self.adapter  # nothing of the teacher's features is guessed
        self.target = Follower(net.host)
        kept = config.queue_steps * context.data.batch_size
        self.queue = Queue(kept, context.dimensions)
        self.taught = Queue(kept, self.teacher.features)

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run the student."""
        local = self.embed_local(self.own(views)[self.whole_views :])
        return {"view_0": self.net.forward_host(views[0]), **local}

    def embed_targets(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run the net that follows, and the teacher."""
        return {"key_1": self.target(views[1]), "teacher_0": self.features_of(views, 1)[0]}

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step.

        Its terms are "contrastive", "relation", and those of the correlation of a query and its key.
        """
        config, (learnt, targets) = self.config, embeddings
        alike = nearest(targets["teacher_0"], self.taught.rows, count=config.neighbors)
        contrastive = ask(learnt, targets, self.queue, temperature=config.temperature)
        relation = mean_of(
            [
                relation_loss(query, self.queue.rows, alike, temperature=config.temperature)
                for query in learnt.values()
            ]
        )
        total, rate = self.less_rate(contrastive + config.weight * relation, [learnt["view_0"]], step)
        self.queue.hold(targets["key_1"])
        self.taught.hold(targets["teacher_0"])
        return total, {
            "contrastive": contrastive.detach(),
            "relation": relation.detach(),
            "coding_rate": rate,
            **correlation_of(learnt["view_0"], targets["key_1"]),
        }

    def after_step(self, step: int) -> None:
        """Move the net that makes the keys, and put keys and features into their queues, in the same order."""
        momentum = rising_momentum(self.config.momentum, step, total_steps=self.total_steps)
        self.target.follow(self.net.host, momentum=momentum)
        self.queue.push()
        self.taught.push()


METHOD = Rekd


def nearest(features: Tensor, queue: Tensor, *, count: int) -> Tensor:
    """Return the (N, count) rows of a (K, F) queue with the largest cosines to (N, F) features."""
    cosines = functional.normalize(wide(features), dim=1) @ functional.normalize(wide(queue), dim=1).T
    return cosines.topk(count, dim=1).indices


def relation_loss(queries: Tensor, queue: Tensor, positives: Tensor, *, temperature: float) -> Tensor:
    """Tell the pictures of a queue that are alike from those that are not.

    Args:
        queries: (N, D) projections; any scale.
        queue: (K, D) keys; any scale.
        positives: (N, P) rows of the queue.
        temperature: of the softmax over cosines, > 0.

    Returns:
        () mean over positives and the global batch of -log softmax, nats; float32 even under autocast.
    """
    with torch.autocast(device_type=queries.device.type, enabled=False):
        q, keys = (functional.normalize(wide(z), dim=1) for z in (queries, queue))
        chances = (q @ keys.T / temperature).log_softmax(1)
        return mean_over_batch(-chances.gather(1, positives).mean(1))
