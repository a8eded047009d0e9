"""What methods share that compare view A with every other view through one encoder."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from edgecl.methods.losses import correlation_of, mean_of
from edgecl.methods.method import Embeddings, Method, RatedConfig, Terms


class PairMethod(Method):
    """Views "view_0" and "view_1", and any local ones, each against "view_0"."""

    config: RatedConfig
    term: ClassVar[str]
    """What `compare` is logged as."""

    def compare(self, z: Tensor, other: Tensor) -> Tensor:
        """Return the () loss between (N, D) projections of the same images."""
        raise NotImplementedError

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step; its terms are `term`, "coding_rate", and those of the correlation."""
        z, *others = embeddings.learnt.values()
        compared = mean_of([self.compare(z, other) for other in others])
        total, rate = self.less_rate(compared, [z, others[0]], step)
        return total, {
            self.term: compared.detach(),
            "coding_rate": rate,
            **correlation_of(z, others[0]),
        }
