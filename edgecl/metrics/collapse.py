"""How good features are: spread, redundancy, effective rank, nearest neighbors. Used while training and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

KNN_NEIGHBORS = 20
KNN_TEMPERATURE = 0.07


def spread(z: Tensor) -> Tensor:
    """Measure how far (N, D) projections are from collapse.

    Returns:
        () mean standard deviation per dimension of the L2-normalized projections, times sqrt(D): 1 when they
        spread evenly over the sphere, 0 when they all agree.

    Source: Chen and He 2021 (SimSiam), arXiv:2011.10566, figure 2.
    """
    unit = functional.normalize(z.detach().float(), dim=1)
    return cast(Tensor, unit.std(0, correction=0).mean() * z.shape[1] ** 0.5)


def rank_me(features: Tensor) -> float:
    """Measure how many dimensions (N, F) features really use: exp of the entropy of the normalized singular values.

    Source: Garrido et al. 2023 (RankMe), arXiv:2210.02885, equation 1.
    """
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def knn_top1(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """Return the accuracy of `knn_correct`, percent."""
    return 100 * float(knn_correct(bank, bank_labels, queries, labels).double().mean())


def knn_correct(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> Tensor:
    """Classify by weighted nearest neighbors on the sphere.

    Args:
        bank: (N, F) features whose labels are known.
        bank_labels: (N,) int64.
        queries: (M, F) features to classify.
        labels: (M,) int64.

    Returns:
        (M,) bool, which queries were given their label.

    Source: Wu et al. 2018, arXiv:1805.01978, section 3.4 (temperature 0.07), with k = 20 as DINO uses.
    """
    bank = functional.normalize(bank.float(), dim=1)
    neighbors = min(KNN_NEIGHBORS, len(bank))
    classes = int(max(int(bank_labels.max()), int(labels.max()))) + 1
    correct = []
    for chunk, truth in zip(queries.float().split(1024), labels.split(1024), strict=True):
        similarity, index = (functional.normalize(chunk, dim=1) @ bank.T).topk(neighbors, dim=1)
        votes = torch.zeros(len(chunk), classes, device=chunk.device)
        votes.scatter_add_(1, bank_labels[index], (similarity / KNN_TEMPERATURE).exp())
        correct.append(votes.argmax(1) == truth)
    return torch.cat(correct)


@torch.no_grad()
def extract_features(
    net: torch.nn.Module, images: Tensor, *, normalize: Callable[[Tensor], Tensor], batch: int = 256
) -> Tensor:
    """Run a net over uint8 images in evaluation mode.

    Args:
        net: (N, 3, H, W) float -> (N, F).
        images: (N, 3, H, W) uint8.
        normalize: uint8 batch -> float batch.

    Returns:
        (N, F) float32 features on the CPU.
    """
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    try:
        return torch.cat([net(normalize(part).to(device)).float().cpu() for part in images.split(batch)])
    finally:
        net.train(was_training)
