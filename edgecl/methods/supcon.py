"""SupCon: pictures of one class are each other's views. It needs labels, and is the upper reference for what does not.

Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv:2004.11362, equation 2 (L_out).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from edgecl.config.recipe import Panel
from edgecl.data.loading import TrainingImages
from edgecl.methods.losses import correlation_of, of_all_processes, wide
from edgecl.methods.method import Embeddings, Method, RatedConfig, Terms


class Config(RatedConfig):
    """L = mean over views i of -mean over the other views p of its class of log softmax_a(z_i z_a / tau)_p."""

    needs_labels: ClassVar[bool] = True
    panels: ClassVar[tuple[Panel, ...]] = (Panel("Loss", {"loss": "SupCon"}, unit="nats", log=True),)

    label: ClassVar[str] = "SupCon"
    name: Literal["supcon"] = "supcon"
    temperature: float = Field(0.1, gt=0, le=100)
    """tau, of the softmax over cosines; the paper's."""


class SupCon(Method):
    """Views "view_0" and "view_1", and any local ones; the classes are the target "labels"."""

    config: Config

    def look_up(self, images: TrainingImages, *, cache: Path) -> Tensor | None:
        """Return the (N,) classes of the pictures."""
        return None if images.labels is None else torch.from_numpy(images.labels).long()

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Embed the views without the classes behind them."""
        return super().embed(views[:-1], step)

    def embed_targets(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Return the classes."""
        return {"labels": views[-1]}

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step; its terms are those of the correlation of the two whole views."""
        views = list(embeddings.learnt.values())
        total = supervised_contrastive_loss(
            views, embeddings.targets["labels"], temperature=self.config.temperature
        )
        total, rate = self.less_rate(total, views[: self.whole_views], step)
        return total, {"coding_rate": rate, **correlation_of(views[0], views[1])}


METHOD = SupCon


def supervised_contrastive_loss(views: Sequence[Tensor], labels: Tensor, *, temperature: float) -> Tensor:
    """Tell the views of pictures of the same class from all other views of the batch.

    Args:
        views: (N, D) projections of each view; any scale.
        labels: (N,) classes.
        temperature: of the softmax over cosines, > 0.

    Returns:
        () mean over the views of the global batch, nats; float32 even under autocast.
    """
    with torch.autocast(device_type=labels.device.type, enabled=False):
        z = torch.cat([of_all_processes(functional.normalize(wide(view), dim=1)) for view in views])
        classes = of_all_processes(labels).repeat(len(views))
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        similarity = (z @ z.T / temperature).masked_fill(itself, float("-inf"))
        positive = (classes[:, None] == classes) & ~itself
        chances = functional.log_softmax(similarity, dim=1).masked_fill(~positive, 0)
        return -(chances.sum(1) / positive.sum(1)).mean()
