"""How good a net is in each precision: one set of images with known answers, run through every form of it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from edgecl.data.decode import JPEG
from edgecl.data.loading import load_eval_images, normalize, split_holdout
from edgecl.data.randomness import permutation
from edgecl.data.source import ImageSource, Split, UnreadableImage
from edgecl.data.sources import has_test_split, open_source
from edgecl.data.unreadable import say_skipped
from edgecl.deploy.session import Run
from edgecl.errors import DataError
from edgecl.metrics.collapse import knn_correct
from edgecl.metrics.intervals import mean_interval, proportion_interval
from edgecl.metrics.label_sets import image_f1
from edgecl.storage.records import Accuracy, ModelRecord, Preprocessing

Metric = Literal["top1", "f1", "knn_top1", "mean_cosine"]

METRICS: dict[str | None, str] = {
    "top1": "top-1",
    "f1": "F1",
    "knn_top1": "kNN top-1",
    "mean_cosine": "mean cosine similarity with fp32",
}
BATCH = 32
# An interval of half a point at 95 %; more images are not worth the time.
MOST_IMAGES = 10_000
MOST_UNLABELLED = 512
# Of a folder without a test split: the same fifth that `probe` and `finetune` hold out.
HOLDOUT = 0.2
# Any readable pictures will do here; the verbs that learn from images apply the recipe's limit.
MAX_BAD_FRACTION = 0.5


@dataclass(frozen=True)
class Outputs:
    """What one form of a net gives: (N, F) for the evaluated images, (M, F) for those of a bank of known labels."""

    queries: Tensor
    bank: Tensor | None


@dataclass(frozen=True)
class Evaluator:
    """Images on which the forms of one net are compared.

    The (N, 3, H, W) uint8 images have (N,) labels for the metrics top1, of a classifier, and knn_top1, of features, where
    the bank holds others with known labels, and (N, K) sets of classes for f1; without labels it is mean_cosine.
    """

    metric: Metric
    images: Tensor
    labels: Tensor | None
    bank: Tensor | None
    bank_labels: Tensor | None
    preprocessing: Preprocessing
    data: str

    def __len__(self) -> int:
        return len(self.images)

    def halves(self) -> tuple[Evaluator, Evaluator]:
        """Split the evaluated images in two: one to search on, one to report on."""
        order = torch.from_numpy(permutation(0, 0, len(self), stream="halves"))
        return self._take(order[: len(self) // 2]), self._take(order[len(self) // 2 :])

    def first(self, count: int) -> Evaluator:
        """Return an evaluator of so many images, an even choice."""
        return self._take(torch.arange(0, len(self), max(1, len(self) // count))[:count])

    def _take(self, index: Tensor) -> Evaluator:
        labels = None if self.labels is None else self.labels[index]
        return replace(self, images=self.images[index], labels=labels)

    def outputs(self, run: Run) -> Outputs:
        """Run a form of the net over the images."""
        bank = None if self.bank is None else self._run(run, self.bank)
        return Outputs(self.queries(run), bank)

    def queries(self, run: Run) -> Tensor:
        """Return the (N, F) outputs for the evaluated images alone."""
        return self._run(run, self.images)

    def _run(self, run: Run, images: Tensor) -> Tensor:
        mean, std = self.preprocessing.mean, self.preprocessing.std
        parts = [run(normalize(part, mean, std).numpy()) for part in images.split(BATCH)]
        return torch.from_numpy(np.concatenate(parts))

    def scores(self, outputs: Outputs, fp32: Outputs) -> Tensor:
        """Return (N,) one number per image: right or wrong, or its F1, in percent, or the cosine similarity with fp32."""
        if self.metric == "mean_cosine":
            return cosines(outputs.queries, fp32.queries)
        assert self.labels is not None
        if self.metric == "f1":
            return 100 * image_f1(outputs.queries, self.labels)
        if self.metric == "top1":
            correct = outputs.queries.argmax(1) == self.labels
        else:
            assert outputs.bank is not None
            assert self.bank_labels is not None
            correct = knn_correct(outputs.bank, self.bank_labels, outputs.queries, self.labels)
        return 100 * correct.double()

    def accuracy(self, outputs: Outputs, fp32: Outputs) -> Accuracy:
        """Return the accuracy of one precision."""
        scores = self.scores(outputs, fp32)
        value = float(scores.mean())
        interval = None
        if self.metric == "f1":
            interval = list(mean_interval(scores.tolist()))
        elif self.metric != "mean_cosine":
            interval = list(proportion_interval(value, len(scores)))
        return Accuracy(
            metric=self.metric,
            value=value,
            ci95=interval,
            n=len(scores),
            data=self.data,
            mean_cosine=float(cosines(outputs.queries, fp32.queries).mean()),
        )


def cosines(found: Tensor, expected: Tensor) -> Tensor:
    """Return the (N,) cosine similarities of (N, F) outputs; of two zero vectors, 1."""
    found, expected = found.double(), expected.double()
    both_zero = (found.norm(dim=1) == 0) & (expected.norm(dim=1) == 0)
    return torch.where(both_zero, 1.0, torch.nn.functional.cosine_similarity(found, expected, dim=1))


def read_images(
    source: ImageSource, named: str, preprocessing: Preprocessing, *, limit: int
) -> tuple[Tensor, Tensor | None]:
    """Read up to so many images, (N, 3, H, W) uint8 at the net's size, and their labels; say what was skipped."""
    loaded = load_eval_images(
        source,
        resize_size=preprocessing.resize_size,
        image_size=preprocessing.image_size,
        max_bad_fraction=MAX_BAD_FRACTION,
        limit=limit,
    )
    say_skipped(loaded.skipped, named)
    return loaded.images, loaded.labels if loaded.label_sets is None else loaded.label_sets


def read_jpegs(source: ImageSource, *, count: int) -> list[bytes]:
    """Return so many JPEG files, evenly chosen: those of the images that are none are made from them."""
    files: list[bytes] = []
    for index in range(0, len(source), max(1, len(source) // count)):
        with contextlib.suppress(UnreadableImage):
            picture = source.read(index)
            content = source.read_bytes(index)
            if content is None or not content.startswith(JPEG):
                written = io.BytesIO()
                picture.save(written, "JPEG", quality=95)
                content = written.getvalue()
            files.append(content)
    return files[:count]


def open_evaluator(
    record: ModelRecord,
    *,
    uri: str | None,
    fallback: str,
    preprocessing: Preprocessing,
    download: bool = False,
) -> Evaluator:
    """Gather the images on which precisions are evaluated.

    They are labelled images as the user named them, or else the held-out part of those the net was made from.

    Raises:
        DataError: other classes than the net's, no labels where the user named images for their labels, or too
            few images.
    """
    named = uri or fallback
    split: Split = "test" if has_test_split(named) else "train"
    source = open_source(named, split=split, download=download)
    classes = record.classes
    wanted = source.label_sets if record.label_sets else source.labels
    usable = wanted is not None and (classes is None or list(source.classes or ()) == list(classes))
    if uri and not usable:
        raise _unusable(source, record, uri)
    strata = source.strata
    if strata is not None and not uri and split == "train":
        source = source.take(split_holdout(strata, HOLDOUT, seed=0)[1])
    limit = MOST_IMAGES if usable else MOST_UNLABELLED
    images, labels = read_images(source, named, preprocessing, limit=limit)
    labels = labels if usable else None
    held_out = "" if uri or split == "test" else " (held out)" if strata is not None else ""
    bank = bank_labels = None
    metric: Metric = "knn_top1" if not classes else "f1" if record.label_sets else "top1"
    metric = metric if usable else "mean_cosine"
    if metric == "knn_top1":
        assert labels is not None
        known, asked = (torch.from_numpy(part) for part in split_holdout(labels.numpy(), 0.5, seed=1))
        bank, bank_labels, images, labels = images[known], labels[known], images[asked], labels[asked]
    if len(images) < 2:
        raise DataError(f"{len(images)} images are too few to evaluate a precision on", where={"eval": named})
    return Evaluator(metric, images, labels, bank, bank_labels, preprocessing, f"{named}{held_out}")


def _unusable(source: ImageSource, record: ModelRecord, uri: str) -> DataError:
    """Return what is wrong with the labels of images that were named for them."""
    if record.label_sets:
        needed = "sets of classes"
        hint = "name a table, csv:FILE, with the columns 'file' and 'labels', of the net's classes"
    else:
        needed = "one class each"
        hint = "put each class in a folder of its own, named as the net's classes: ROOT/CLASS/image.jpg"
    if source.strata is None:
        problem = "these images have no labels"
    elif (source.label_sets is not None) != record.label_sets:
        has = "one class each" if record.label_sets else "sets of classes"
        problem = f"these images have {has}, and this net needs {needed}"
    else:
        problem = f"these images have other classes than the net: {_only_in(source.classes or (), record.classes or ())}"
    return DataError(problem, where={"eval": uri}, hint=hint)


def _only_in(found: Sequence[str], own: Sequence[str]) -> str:
    more, fewer = sorted(set(found) - set(own)), sorted(set(own) - set(found))
    parts = [f"'{more[0]}' and {len(more) - 1} more are not the net's"] if more else []
    parts += [f"'{fewer[0]}' and {len(fewer) - 1} more are missing"] if fewer else []
    return "; ".join(parts) or "in another order"
