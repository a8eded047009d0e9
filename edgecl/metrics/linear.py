"""A linear classifier on frozen features: standardized, its regularization chosen on a part of the training data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# Weights of the L2 penalty, strongest first: each fit starts where the one before it ended.
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0001)
_ITERATIONS = 60


@dataclass(frozen=True)
class LinearClassifier:
    """Multinomial logistic regression on standardized features.

    Attributes:
        mean: (F,) of the training features.
        deviation: (F,) of the training features.
        weight: (K, F).
        bias: (K,).
        penalty: the L2 weight that was chosen.
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float

    def logits(self, features: Tensor) -> Tensor:
        """Return (N, K) logits of (N, F) features."""
        return functional.linear((features - self.mean) / self.deviation, self.weight, self.bias)

    def predict(self, features: Tensor) -> Tensor:
        """Return (N,) labels of (N, F) features."""
        return self.logits(features).argmax(1)

    def top1(self, features: Tensor, labels: Tensor) -> float:
        """Return the accuracy on (N, F) features, percent."""
        return 100 * int((self.predict(features) == labels).sum()) / len(labels)


def fit_linear(features: Tensor, labels: Tensor, *, classes: int) -> LinearClassifier:
    """Fit a linear classifier; the penalty is the one that did best on held-out folds of the same data.

    Args:
        features: (N, F) float32.
        labels: (N,) int64.
    """
    mean = features.mean(0)
    deviation = features.std(0, correction=0)
    # A feature that never changes says nothing: its standardized value is 0, not 0/0.
    deviation = torch.where(deviation > 1e-6 * deviation.max().clamp(min=1e-12), deviation, torch.inf)
    standard = (features - mean) / deviation
    penalty = _choose_penalty(standard, labels, classes)
    weight, bias = _fit(standard, labels, classes, PENALTIES[: PENALTIES.index(penalty) + 1])[-1]
    return LinearClassifier(mean, deviation, weight, bias, penalty)


def _choose_penalty(features: Tensor, labels: Tensor, classes: int) -> float:
    """Choose the penalty on one fifth of the data, or, where labels are few, on each half in turn."""
    few = len(labels) < 20 * classes
    place = torch.from_numpy(place_in_class(labels.numpy()))
    folds = [place % 2 == 0, place % 2 == 1] if few else [place % 5 == 0]
    correct = torch.zeros(len(PENALTIES))
    loss = torch.zeros(len(PENALTIES))
    for held_out in folds:
        if bool(held_out.all()) or not bool(held_out.any()):
            # One label per class: nothing can be held out, and a strong penalty is the safe choice.
            return PENALTIES[1]
        fits = _fit(features[~held_out], labels[~held_out], classes, PENALTIES)
        for index, (weight, bias) in enumerate(fits):
            logits = functional.linear(features[held_out], weight, bias)
            correct[index] += (logits.argmax(1) == labels[held_out]).sum()
            loss[index] += functional.cross_entropy(logits, labels[held_out], reduction="sum")
    # Accuracy on a few images ties often; the likelihood decides then.
    best = max(range(len(PENALTIES)), key=lambda index: (float(correct[index]), -float(loss[index])))
    return PENALTIES[best]


def place_in_class(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count, for each of (N,) labels, the earlier ones of its class."""
    by_class = np.argsort(labels, kind="stable")
    grouped = labels[by_class]
    place = np.empty(len(labels), dtype=np.int64)
    place[by_class] = np.arange(len(labels)) - np.searchsorted(grouped, grouped)
    return place


def _fit(
    features: Tensor, labels: Tensor, classes: int, penalties: tuple[float, ...]
) -> list[tuple[Tensor, Tensor]]:
    """Fit one classifier per penalty with L-BFGS, each starting from the one before."""
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    fits = []
    for penalty in penalties:
        solver = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def objective(solver: torch.optim.LBFGS = solver, penalty: float = penalty) -> Tensor:
            solver.zero_grad()
            loss = functional.cross_entropy(functional.linear(features, weight, bias), labels)
            loss = loss + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        solver.step(objective)
        fits.append((weight.detach().clone(), bias.detach().clone()))
    return fits
