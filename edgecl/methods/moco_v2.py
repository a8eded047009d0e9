"""MoCo-v2: view A is told from the pictures of the last steps, as a slowly moving copy of the encoder sees them.

Source: He et al. 2020 (MoCo), arXiv:1911.05722, equation 1; Chen et al. 2020 (MoCo-v2), arXiv:2003.04297. Batches are
not shuffled between processes: `run.sync_norms` takes what a norm could tell of a share's positives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from edgecl.config.recipe import ForwardPasses, Panel, Recipe
from edgecl.config.settings import Fraction
from edgecl.methods.losses import correlation_of
from edgecl.methods.method import Embeddings, Method, RatedConfig, RunContext, Terms
from edgecl.methods.momentum import Follower, Queue, ask, rising_momentum
from edgecl.nets.slimming import SlimmableNet


class Config(RatedConfig):
    """L = mean of -log softmax over (key of the same picture, queue) of cos(query, .) / tau."""

    panels: ClassVar[tuple[Panel, ...]] = (Panel("Loss", {"loss": "InfoNCE"}, unit="nats", log=True),)

    label: ClassVar[str] = "MoCo-v2"
    name: Literal["moco-v2"] = "moco-v2"
    temperature: float = Field(0.2, gt=0, le=100)
    """tau, of the softmax over cosines; the paper's."""
    momentum: Fraction = 0.95
    """Of the net that makes the keys, at the first step; it rises to 1, as solo-learn's from 0.99. The paper's is 0.999, for
    long runs: in short ones the copy would long be of the random start."""
    queue_steps: int = Field(4, ge=1, le=100_000)
    """Of so many last steps the keys are kept. The paper keeps 256, where weights change little in a step; keys that are
    old for how fast the net changes are told from new ones by their age."""
    symmetric: bool = False
    """Each view asks once and answers once: twice the price."""

    def rated_views(self, recipe: Recipe) -> int:
        """Count the views that ask."""
        return 2 if self.symmetric else 1

    def forward_passes(self, recipe: Recipe) -> ForwardPasses:
        """Return those of the views that ask, and one for each that answers: 4 of one net, 8 where symmetric."""
        passes, asking = super().forward_passes(recipe), self.rated_views(recipe)
        return passes._replace(whole={recipe.host.width: 3.0 * asking}).with_targets(asking)


class MocoV2(Method):
    """Its embeddings: queries "view_0", "view_1" where symmetric, "local_0" and on; targets "key_1", and "key_0"."""

    config: Config

    def __init__(self, config: Config, net: SlimmableNet, context: RunContext):
        super().__init__(config, net, context)
        self.target = Follower(net.host)
        self.queue = Queue(config.queue_steps * context.data.batch_size, context.dimensions)

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run what asks."""
        asking = 2 if self.config.symmetric else 1
        whole = {f"view_{number}": self.net.forward_host(views[number]) for number in range(asking)}
        return {**whole, **self.embed_local(views[self.whole_views :])}

    def embed_targets(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run what answers, in the net that follows."""
        answering = (1, 0) if self.config.symmetric else (1,)
        return {f"key_{number}": self.target(views[number]) for number in answering}

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step; its terms are those of the correlation of a query and its key."""
        learnt, keys = embeddings
        total = ask(learnt, keys, self.queue, temperature=self.config.temperature)
        asking = [query for name, query in learnt.items() if name.startswith("view")]
        total, rate = self.less_rate(total, asking, step)
        self.queue.hold(keys["key_1"])
        return total, {"coding_rate": rate, **correlation_of(learnt["view_0"], keys["key_1"])}

    def after_step(self, step: int) -> None:
        """Move the net that answers, and put the keys into the queue."""
        momentum = rising_momentum(self.config.momentum, step, total_steps=self.total_steps)
        self.target.follow(self.net.host, momentum=momentum)
        self.queue.push()


METHOD = MocoV2
