"""Data sets by torchvision: those that it has on the disk, or fetches."""

from __future__ import annotations

import warnings

import numpy as np

from edgecl.data.source import ImageSource, Split, expanded, read_plain_file, sha256_of
from edgecl.errors import DataError
from edgecl.onboard.pictures import open_with_pillow

# torchvision's class and the `train`/`split` argument that picks each half.
SETS: dict[str, tuple[str, dict[Split, dict[str, object]]]] = {
    "cifar10": ("CIFAR10", {"train": {"train": True}, "test": {"train": False}}),
    "cifar100": ("CIFAR100", {"train": {"train": True}, "test": {"train": False}}),
    "fashion-mnist": ("FashionMNIST", {"train": {"train": True}, "test": {"train": False}}),
    "flowers102": ("Flowers102", {"train": {"split": "train"}, "test": {"split": "test"}}),
    "stl10": ("STL10", {"train": {"split": "train"}, "test": {"split": "test"}}),
}

SUMMARIES = {
    "cifar10:PATH": "CIFAR-10 through torchvision: 50,000 images of 32 px, 10 classes",
    "cifar100:PATH": "CIFAR-100 through torchvision: 50,000 images of 32 px, 100 classes",
    "fashion-mnist:PATH": "Fashion-MNIST through torchvision: 60,000 grayscale images of 28 px, 10 classes",
    "flowers102:PATH": "Oxford Flowers through torchvision: 1,020 images, 102 classes",
    "stl10:PATH": "STL-10's labelled part through torchvision: 5,000 images of 96 px, 10 classes",
}


def open_set(uri: str, *, split: Split, download: bool) -> ImageSource:
    """Open SCHEME:PATH.

    `flowers102` trains on torchvision's 'train' split and `stl10` on its labelled 'train' split, so that every set has
    labels. CIFAR's official archive is a pickle. torchvision checks every file of it against a known md5 before it
    unpickles; edgecl relies on that check and unpickles nothing itself.

    Raises:
        DataError: no path, or the set is not there.
    """
    scheme, _, path = uri.partition(":")
    if not path:
        raise DataError(f"'{uri}' needs a place on disk", hint=f"write {scheme}:PATH")
    root = expanded(path)
    from torchvision import datasets

    class_name, arguments = SETS[scheme]
    options = dict(arguments[split])
    if scheme == "flowers102":
        # The one set whose pictures are files; torchvision holds the folder to no sum, and would open them as anything.
        options["loader"] = lambda path: open_with_pillow(read_plain_file(str(path)))
    try:
        with warnings.catch_warnings():
            # NumPy 2.4 dislikes how CIFAR's old pickles spell a dtype.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            dataset = getattr(datasets, class_name)(root, download=download, **options)
    except ImportError as exc:
        raise DataError(
            f"reading {scheme} needs the package '{exc.name}'", hint=f"pip install {exc.name}"
        ) from exc
    except Exception as exc:
        if download:
            raise DataError(
                f"{scheme} could not be fetched: {exc}", where={"into": root}, hint="try again later"
            ) from exc
        raise DataError(
            f"{scheme} is not there, or its files are not whole",
            where={"place": root},
            hint="--download lets torchvision fetch it",
        ) from exc
    # Each set keeps its labels under another name; reading them through items would decode every image.
    kept = next(getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name))
    labels = np.asarray(kept, dtype=np.int64)
    classes = getattr(dataset, "classes", None) or [str(label) for label in range(int(labels.max()) + 1)]
    return ImageSource(
        uri=uri,
        fingerprint=sha256_of(f"{scheme} {split} {len(dataset)}"),
        length=len(dataset),
        opener=lambda index: dataset[index][0],
        namer=lambda index: f"{scheme} {split} {index}",
        classes=tuple(str(name) for name in classes),
        labels=labels,
    )
