"""Labelled images to evaluate a net on: a part to learn from and a held-out part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgecl.data.loading import choose_images, load_eval_images, split_holdout
from edgecl.data.randomness import permutation
from edgecl.data.source import ImageSource, Split
from edgecl.data.sources import has_test_split, open_source
from edgecl.data.survey import copies
from edgecl.data.unreadable import say_skipped
from edgecl.errors import DataError, counted, first_of, tell
from edgecl.storage.records import Preprocessing

HOLDOUT = 0.2


@dataclass(frozen=True)
class Part:
    """Some labelled images.

    Attributes:
        images: (N, 3, H, W) uint8, resized and cropped.
        labels: (N,) int64; or (N, K) float32 of zeros and ones, where an image may be of several classes.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Part:
        """Return the images at (M,) indices."""
        return Part(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Labelled:
    """What a net is evaluated on.

    Attributes:
        test: held out; nothing is ever chosen on it.
        train_from: where the images to learn from came from.
        test_from: where the held-out images came from.
    """

    train: Part
    test: Part
    classes: tuple[str, ...]
    train_from: str
    test_from: str


def read_labelled(
    data: str,
    *,
    test: str | None,
    preprocessing: Preprocessing,
    max_bad_fraction: float = 0.01,
    limit: int | None = None,
    download: bool = False,
    label_sets: bool = False,
) -> Labelled:
    """Read labelled images: the data set's own test split, another URI, or a stratified fifth held out.

    Args:
        data: a data URI with labels.
        test: a data URI for the held-out part; its classes must be those of `data`.
        max_bad_fraction: unreadable images skipped before it is an error.
        limit: use only so many of the images to learn from, an even choice per class.

    Raises:
        DataError: no labels, sets of classes where they are not taken, other classes in the test part or the same
            images, or too many unreadable ones.
    """
    source = _with_labels(open_source(data, split="train", download=download), label_sets=label_sets)

    def load(source: ImageSource, limit: int | None = None) -> Part:
        loaded = load_eval_images(
            source,
            resize_size=preprocessing.resize_size,
            image_size=preprocessing.image_size,
            max_bad_fraction=max_bad_fraction,
            limit=limit,
        )
        say_skipped(loaded.skipped, source.uri)
        labels = loaded.labels if loaded.label_sets is None else loaded.label_sets
        assert labels is not None
        return Part(loaded.images, labels)

    classes = source.classes or ()
    if test is None and not has_test_split(data):
        whole = load(source)
        strata = strata_of(whole.labels)
        train_index, test_index = split_holdout(strata, HOLDOUT, seed=0)
        stay = choose_images(strata[train_index], len(train_index), limit)
        return Labelled(
            whole.take(torch.from_numpy(train_index[stay])),
            whole.take(torch.from_numpy(test_index)),
            classes,
            train_from=f"{data} ({100 * (1 - HOLDOUT):.0f} % of it)",
            test_from=f"{data} ({100 * HOLDOUT:.0f} % held out, stratified; a net pretrained on this folder has seen "
            "these images, without labels)",
        )
    held_out = _open_test(test or data, source, download=download, label_sets=label_sets)
    return Labelled(
        load(source, limit),
        load(held_out),
        classes,
        train_from=data,
        test_from=test or f"{data} (test split)",
    )


def check_labelled(
    data: str, *, test: str | None, per_class: int, limit: int | None = None, download: bool = False
) -> bool:
    """Check labels without decoding an image; return whether the images have labels at all.

    Raises:
        DataError: other classes in the test part or the same images, or fewer of a class than labels asked for.
    """
    source = open_source(data, split="train", download=download)
    if source.labels is None:
        return False
    if test is not None or has_test_split(data):
        _open_test(test or data, source, download=download, label_sets=False)
        part = source.labels
    else:
        part = source.labels[split_holdout(source.labels, HOLDOUT, seed=0)[0]]
    part = part[choose_images(part, len(part), limit)]
    draw_few(torch.from_numpy(part), per_class=per_class, draw=0)
    return True


def strata_of(labels: Tensor) -> NDArray[np.int64]:
    """Return (N,) of what an even share is held out: the classes, or of sets of classes the number in each."""
    return (labels if labels.ndim == 1 else labels.sum(1).long()).numpy()


def _open_test(test: str, source: ImageSource, *, download: bool, label_sets: bool) -> ImageSource:
    split: Split = "test" if has_test_split(test) else "train"
    held_out = _with_labels(open_source(test, split=split, download=download), label_sets=label_sets)
    if held_out.classes != source.classes:
        theirs, ours = (first_of(one.classes or ()) for one in (held_out, source))
        raise DataError(
            f"the test images have other classes: {theirs} against {ours}",
            where={"data": source.uri, "test": test},
            hint="class folders must have the same names on both sides",
        )
    same = copies(source, held_out)[0]
    # What is no folder has no files to compare.
    if len(same) == len(held_out) or (held_out.sizes is None and held_out.fingerprint == source.fingerprint):
        raise DataError(
            "every held-out image is among those to learn from",
            where={"data": source.uri, "test": test},
            hint="name others, or leave --test out: a fifth is held out",
        )
    if same:
        named = first_of(
            [f"{held_out.describe(there)} is {source.describe(here)}" for there, here in same.items()]
        )
        tell(
            f"LEAK: {len(same):,} of {counted(len(held_out), 'held-out image')} are learned from too: {named}"
        )
    return held_out


def _with_labels(source: ImageSource, *, label_sets: bool) -> ImageSource:
    if source.label_sets is not None:
        if label_sets:
            return source
        raise DataError(
            "an image may be of several classes here, and this needs one class of each",
            where={"data": source.uri},
            hint="`edgecl finetune` takes sets of classes; a table with one class of each has the column 'label'",
        )
    if source.labels is None or source.classes is None:
        raise DataError(
            "these images have no labels",
            where={"data": source.uri},
            hint="put each class in a folder of its own: ROOT/CLASS/image.jpg; shards carry the class of every image as "
            "a .cls member",
        )
    return source


def draw_few(labels: Tensor, *, per_class: int, draw: int) -> Tensor:
    """Choose (per_class * K,) of the labelled images, so many of each class, the same for every net that is compared.

    Args:
        labels: (N,) int64 of the images to choose from.
        per_class: images of each class.
        draw: which draw, 0-based; a draw is a function of this number alone.

    Raises:
        DataError: a class has fewer images.
    """
    order = permutation(draw, 0, len(labels))
    truth = labels.numpy()[order]
    chosen = []
    for label in np.unique(truth):
        members = order[truth == label]
        if len(members) < per_class:
            raise DataError(
                f"class {int(label)} has {len(members)} images to learn from, fewer than the {per_class} labels "
                "per class asked for",
                hint="lower --labels-per-class",
            )
        chosen.append(members[:per_class])
    return torch.from_numpy(np.concatenate(chosen))
