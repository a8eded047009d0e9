"""Nets that follow another slowly, and the embeddings of the last steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgecl.methods.losses import mean_of, of_all_processes, queue_contrastive_loss
from edgecl.nets.backbone import is_norm


class Follower(nn.Module):
    """A copy of a net whose weights are a moving average of the net's: nothing learns in its passes.

    Its batch norms use the statistics of each batch and keep none: it is never evaluated.
    """

    def __init__(self, leader: nn.Module):
        super().__init__()
        self.net = copy.deepcopy(leader).requires_grad_(False)
        norms: list[Any] = [module for module in self.net.modules() if is_norm(module)]
        for norm in norms:
            norm.track_running_stats = False

    def forward(self, x: Tensor) -> Tensor:
        """Run the copy."""
        outputs: Tensor = self.net(x)
        return outputs

    @torch.no_grad()
    def follow(self, leader: nn.Module, *, momentum: float) -> None:
        """Move every weight to `momentum` of itself and the rest of the leader's."""
        torch._foreach_lerp_(list(self.net.parameters()), list(leader.parameters()), 1 - momentum)


def rising_momentum(first: float, step: int, *, total_steps: int) -> float:
    """Return a momentum that rises from `first` to 1 along a cosine.

    Source: Grill et al. 2020 (BYOL), arXiv:2006.07733, section 3.3.
    """
    return 1 - (1 - first) * (math.cos(math.pi * step / total_steps) + 1) / 2


class Queue(nn.Module):
    """The newest embeddings of a run, of the global batches of its last steps; it begins with random directions."""

    def __init__(self, size: int, dimensions: int):
        super().__init__()
        self.register_buffer("rows", functional.normalize(torch.randn(size, dimensions), dim=1))
        self.rows: Tensor
        """(size, dimensions), the newest first."""
        self._newest: Tensor | None = None

    def hold(self, embeddings: Tensor) -> None:
        """Keep the (n, dimensions) embeddings of this process's share until the step has been taken."""
        self._newest = embeddings.detach()

    @torch.no_grad()
    def push(self) -> None:
        """Put what is held, of all processes, in front; the oldest fall out."""
        assert self._newest is not None
        newest = of_all_processes(self._newest.to(self.rows.dtype))
        self.rows.copy_(torch.cat([newest, self.rows])[: len(self.rows)])
        self._newest = None


def ask(
    queries: Mapping[str, Tensor], keys: Mapping[str, Tensor], queue: Queue, *, temperature: float
) -> Tensor:
    """Return the () mean InfoNCE of queries: "view_1" asks for "key_0", every other view for "key_1".

    Args:
        queries: name of a view -> (N, D) projections; any scale.
        keys: "key_0" and "key_1", or the latter -> (N, D) projections of the net that follows; any scale.
    """
    asked = [(query, keys["key_0" if name == "view_1" else "key_1"]) for name, query in queries.items()]
    return mean_of([queue_contrastive_loss(*pair, queue.rows, temperature=temperature) for pair in asked])
