"""F1 of each picture and mean average precision, against counts by hand and a definition written out in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgecl.metrics.label_sets import image_f1, mean_average_precision


def precision_by_definition(scores, true):
    """The mean over the true pictures of the share of true ones among those that score as much or more."""
    shares = []
    for mine, is_true in zip(scores, true, strict=True):
        if is_true:
            above = [other_true for other, other_true in zip(scores, true, strict=True) if other >= mine]
            shares.append(sum(above) / len(above))
    return float(np.mean(shares))


@pytest.mark.parametrize("levels", [1000, 4])
def test_mean_average_precision_is_that_of_its_definition_with_ties_too(levels):
    drawn = torch.Generator().manual_seed(0)
    logits = torch.randint(levels, (50, 6), generator=drawn).float()
    sets = (torch.rand(50, 6, generator=drawn) < 0.3).float()
    sets[:, 2] = 0  # no picture is of this class
    expected = [
        precision_by_definition(logits[:, k].tolist(), sets[:, k].bool().tolist()) for k in (0, 1, 3, 4, 5)
    ]
    assert mean_average_precision(logits, sets) == pytest.approx(np.mean(expected))


def test_scores_that_rank_every_class_perfectly_have_precision_one():
    sets = torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 0]])
    assert mean_average_precision(sets * 4 - 9, sets) == 1.0


def test_f1_of_each_picture_by_hand():
    sets = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]])
    logits = torch.tensor([[2.0, 1, -1], [3, -2, 0.5], [-1, -1, -1], [1, -1, -1], [-1, -1, -1]])
    assert image_f1(logits, sets).tolist() == [1.0, 0.5, 1.0, 0.0, 0.0]
