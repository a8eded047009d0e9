"""What a number does not show: which classes a net confuses, its most confident mistakes, and how its features lie."""

from __future__ import annotations

from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from edgecl.data.randomness import permutation
from edgecl.data.thumbnail import small_jpeg
from edgecl.evaluate.labelled import Labelled
from edgecl.storage.records import Confusion, FeatureMap, InspectionRecord, Mistake

MISTAKES = 16
MAP_POINTS = 600
_FEWEST_FOR_UMAP = 50
_PICTURE_SIDE = 96


def inspect(
    features: Tensor,
    logits: Tensor,
    labelled: Labelled,
    *,
    predicted_by: Literal["linear probe", "classifier"],
    made_from: str | None,
) -> InspectionRecord:
    """Look at what a net makes of held-out images.

    Args:
        features: (N, F) of the net.
        logits: (N, K) of what predicts.
        made_from: for the record, the hash of the net's.
    """
    part = labelled.test
    confidences, predicted = logits.float().softmax(1).max(1)
    pairs, counts = torch.stack([part.labels, predicted], 1).unique(dim=0, return_counts=True)
    wrong = (predicted != part.labels).nonzero().flatten()
    wrong = wrong[confidences[wrong].argsort(descending=True, stable=True)]
    return InspectionRecord(
        made_from=made_from,
        predicted_by=predicted_by,
        classes=list(labelled.classes),
        confusion=[
            Confusion(label=label, predicted=other, images=count)
            for (label, other), count in zip(pairs.tolist(), counts.tolist(), strict=True)
        ],
        mistakes=[
            Mistake(
                picture=small_jpeg(
                    Image.fromarray(part.images[index].permute(1, 2, 0).numpy()),
                    side=_PICTURE_SIDE,
                    quality=85,
                ),
                label=int(part.labels[index]),
                predicted=int(predicted[index]),
                confidence=min(float(confidences[index]), 1.0),
            )
            for index in wrong[:MISTAKES].tolist()
        ],
        map=feature_map(features, part.labels),
        n_test=len(part),
        test=labelled.test_from,
    )


def feature_map(features: Tensor, labels: Tensor) -> FeatureMap:
    """Place images on a plane by their (N, F) features: by UMAP where it is installed, else by principal components.

    At most MAP_POINTS of them, drawn at random, always the same.
    """
    # Not every so many: images often come with their classes in turn.
    chosen = torch.from_numpy(permutation(0, 0, len(features), stream="map")[:MAP_POINTS].copy())
    # Of length 1, as the nearest neighbors compare them: a few bright pictures would else fill the plane.
    features, labels = functional.normalize(features[chosen].double(), dim=1), labels[chosen]
    projected = _by_umap(features)
    if projected is None:
        points, explained = principal_components(features)
    else:
        points, explained = projected, None
    # Four digits are more than a picture shows.
    x, y = ([float(f"{value:.4g}") for value in axis.tolist()] for axis in points.T)
    return FeatureMap(
        made_by="UMAP" if explained is None else "PCA",
        explained=explained,
        x=x,
        y=y,
        label=labels.tolist(),
    )


def _by_umap(features: Tensor) -> Tensor | None:
    """Return (N, 2) coordinates; None where UMAP is not installed, or the images are too few for it."""
    if len(features) < _FEWEST_FOR_UMAP:
        return None
    try:
        import umap
    except ImportError:
        return None
    # A seed makes it the same every time, on one core.
    return torch.from_numpy(umap.UMAP(random_state=0, n_jobs=1).fit_transform(features.numpy()))


def principal_components(features: Tensor) -> tuple[Tensor, list[float]]:
    """Project (N, F) features on the two directions of their largest variance, and give the share of each.

    Returns:
        (N, 2) coordinates, the largest loading of each direction positive, and two shares of the whole variance.
    """
    centered = features - features.mean(0)
    _, singular, directions = torch.linalg.svd(centered, full_matrices=False)
    directions = functional.pad(directions, (0, 0, 0, 2))[:2]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    points = centered @ (directions * largest.sign()).T
    variances = functional.pad(singular.square(), (0, 2))
    shares = variances[:2] / variances.sum().clamp(min=torch.finfo(variances.dtype).tiny)
    return points, shares.tolist()
