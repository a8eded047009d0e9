"""How good guesses are where a picture may be of several classes: F1 of each picture, average precision of each class."""

from __future__ import annotations

import torch
from torch import Tensor


def image_f1(logits: Tensor, label_sets: Tensor) -> Tensor:
    """Return (N,) the F1 of each picture: 2 |guessed and true| / (|guessed| + |true|), 1 where both sets are empty.

    Args:
        logits: (N, K); a class is guessed where its logit is above 0, a chance of one half.
        label_sets: (N, K) of zeros and ones.
    """
    guessed, true = logits > 0, label_sets > 0
    both = (guessed & true).sum(1).double()
    sizes = guessed.sum(1) + true.sum(1)
    return torch.where(sizes == 0, 1.0, 2 * both / sizes.clamp(min=1))


def mean_average_precision(logits: Tensor, label_sets: Tensor) -> float:
    """Return the mean over the classes of their average precision, 0 to 1; classes that no picture is of are left out.

    The average precision of a class is the mean, over its pictures, of the share of its pictures among all with a logit
    as large or larger.

    Args:
        logits: (N, K).
        label_sets: (N, K) of zeros and ones.
    """
    found = []
    for scores, true in zip(logits.double().T, label_sets.T > 0, strict=True):
        if not true.any():
            continue
        asked = scores[true]
        # As many pictures as have this score or a larger one: where scores are equal, the last of them.
        ranks = len(scores) - torch.searchsorted(scores.sort().values, asked)
        hits = len(asked) - torch.searchsorted(asked.sort().values, asked)
        found.append(float((hits / ranks).mean()))
    return sum(found) / len(found) if found else 0.0
