"""Where images come from: a folder, the embedded demo set, or a torchvision set."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgecl.errors import DataError, near_matches

Split = Literal["train", "test"]
Labels = NDArray[np.int64]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# torchvision's class and the `train`/`split` argument that picks each half.
_TORCHVISION: dict[str, tuple[str, dict[Split, dict[str, object]]]] = {
    "cifar10": ("CIFAR10", {"train": {"train": True}, "test": {"train": False}}),
    "cifar100": ("CIFAR100", {"train": {"train": True}, "test": {"train": False}}),
    "fashion-mnist": ("FashionMNIST", {"train": {"train": True}, "test": {"train": False}}),
    "flowers102": ("Flowers102", {"train": {"split": "train"}, "test": {"split": "test"}}),
    "stl10": ("STL10", {"train": {"split": "train"}, "test": {"split": "test"}}),
}

_SUMMARIES = {
    "demo": "images drawn by edgecl itself; nothing to download",
    "FOLDER": "JPEG, PNG, WebP and BMP files at any depth; sub-folders are classes",
    "cifar10:PATH": "CIFAR-10 through torchvision: 50,000 images of 32 px, 10 classes",
    "cifar100:PATH": "CIFAR-100 through torchvision: 50,000 images of 32 px, 100 classes",
    "fashion-mnist:PATH": "Fashion-MNIST through torchvision: 60,000 grey images of 28 px, 10 classes",
    "flowers102:PATH": "Oxford Flowers through torchvision: 1,020 images, 102 classes",
    "stl10:PATH": "STL-10's labelled part through torchvision: 5,000 images of 96 px, 10 classes",
}

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDES_SWAP = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}

_SPLIT_FOLDERS = {"train", "training", "test", "testing", "val", "valid", "validation"}


class UnreadableImage(Exception):  # noqa: N818 - a condition that the loader counts, not an error of edgecl's
    """One image that cannot be decoded; the loader counts, names and skips it."""


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images by index, with labels where there are any."""

    uri: str
    fingerprint: str
    """sha256 over a folder's names and sizes in bytes, or a set's name, split and length."""
    length: int
    opener: Callable[[int], Image.Image] = field(repr=False)
    """Index -> picture as stored, of any mode, not necessarily decoded yet."""
    namer: Callable[[int], str] = field(repr=False)
    classes: tuple[str, ...] | None = None
    labels: Labels | None = field(default=None, repr=False)
    """(N,) positions in `classes`."""

    def __len__(self) -> int:
        """Count the images, unreadable ones included."""
        return self.length

    def describe(self, index: int) -> str:
        """Name an image as a person would look for it: its path, or 'cifar10 train 17'."""
        return self.namer(index)

    def take(self, indices: NDArray[np.int64]) -> ImageSource:
        """Return a source of the images at (M,) indices, in that order."""
        return replace(
            self,
            fingerprint=_sha256(f"{self.fingerprint} {indices.tolist()}"),
            length=len(indices),
            opener=lambda index: self.opener(int(indices[index])),
            namer=lambda index: self.namer(int(indices[index])),
            labels=None if self.labels is None else self.labels[indices],
        )

    def read(self, index: int) -> Image.Image:
        """Decode one image to RGB, the right way up, transparent parts white.

        Raises:
            UnreadableImage: truncated, corrupt, empty, gone, or too large to be honest.
        """
        return self._decode(index, at_least=None)[0]

    def read_reduced(self, index: int, at_least: int) -> tuple[Image.Image, int, int]:
        """Decode one image like `read`, where the format allows it at a reduced scale.

        Args:
            index: which image.
            at_least: pixels that both sides keep, if they had them.

        Returns:
            The picture, and the true height and width it would have had in full.

        Raises:
            UnreadableImage: as in `read`.
        """
        return self._decode(index, at_least=at_least)

    def _decode(self, index: int, *, at_least: int | None) -> tuple[Image.Image, int, int]:
        # Decoders meet every kind of broken file with every kind of exception.
        try:
            with self.opener(index) as image:
                width, height = image.size
                if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
                    raise UnreadableImage(f"{width} x {height} pixels is suspiciously large")
                if at_least is not None:
                    image.draft(None, (at_least, at_least))
                image.load()
                turn = _exif_turn(image)
                if turn in _SIDES_SWAP:
                    width, height = height, width
                return _rgb(image if turn is None else image.transpose(turn)), height, width
        except UnreadableImage:
            raise
        except Exception as complaint:
            raise UnreadableImage(_reason(complaint)) from complaint


def open_source(uri: str, *, split: Split = "train", download: bool = False) -> ImageSource:
    """Open the images that a data URI names.

    A folder is read at any depth, links to folders included, dot files left out. When every image lies
    under at least one sub-folder, and there are two or more of these, the first path component below the
    root is the class. `flowers102` trains on torchvision's 'train' split and `stl10` on its labelled
    'train' split, so that every set named by a scheme has labels.

    CIFAR's official archive is a pickle. torchvision holds every file of it to a known md5 before it
    unpickles; edgecl relies on that check and unpickles nothing itself.

    Args:
        uri: a folder, `demo`, or SCHEME:PATH as `list_datasets` names them.
        split: 'test' gives held-out images; a folder has none.
        download: let torchvision fetch a set that is missing.

    Raises:
        DataError: unknown, missing or empty; or a test split asked of a folder.
    """
    if uri == "demo":
        return _open_demo(split)
    scheme, colon, path = uri.partition(":")
    if scheme in _TORCHVISION:
        if not path:
            raise DataError(f"'{uri}' needs a place on disk", hint=f"write {scheme}:PATH")
        return _open_torchvision(uri, scheme, Path(path).expanduser(), split=split, download=download)
    root = Path(uri).expanduser()
    if root.is_dir():
        if split == "test":
            raise DataError(
                f"the folder '{uri}' has no test split", hint="name a second folder with the held-out images"
            )
        return _open_folder(uri, root)
    if root.exists():
        raise DataError(f"'{uri}' is a file, not a folder of images", hint=f"pass the folder: {root.parent}")
    if colon and scheme.replace("-", "").replace("_", "").isalnum():
        raise DataError(
            f"unknown kind of data '{scheme}' in '{uri}'", hint=near_matches(scheme.lower(), _TORCHVISION)
        )
    raise DataError(f"no folder '{uri}'", hint="a data URI is one of: " + ", ".join(_SUMMARIES))


def absolute_uri(uri: str) -> str:
    """Return a data URI that means the same from any working directory, for records that others read later."""
    scheme, separator, path = uri.partition(":")
    if separator and scheme in _TORCHVISION:
        return f"{scheme}:{Path(path).absolute()}"
    return uri if uri == "demo" else str(Path(uri).absolute())


def has_test_split(uri: str) -> bool:
    """Say whether a data URI comes with held-out images of its own."""
    return uri == "demo" or uri.partition(":")[0] in _TORCHVISION


def list_datasets() -> list[dict[str, str]]:
    """List the forms of a data URI: name and summary."""
    return [{"name": name, "summary": summary} for name, summary in _SUMMARIES.items()]


def _open_demo(split: Split) -> ImageSource:
    from edgecl.data import demo_images

    count = demo_images.TRAIN_IMAGES if split == "train" else demo_images.TEST_IMAGES
    pictures, labels = _draw_demo(split, count)
    return ImageSource(
        uri="demo",
        fingerprint=_sha256(f"demo {split} {count} of {demo_images.SIZE} px"),
        length=count,
        opener=lambda index: Image.fromarray(pictures[index]),
        namer=lambda index: f"demo {split} {index}",
        classes=tuple(demo_images.CLASSES),
        labels=labels.astype(np.int64),
    )


@cache
def _draw_demo(split: Split, count: int) -> tuple[NDArray[np.uint8], Labels]:
    """Draw the demo's pictures once per process, however often they are opened."""
    from edgecl.data import demo_images

    return demo_images.render(split, count, size=demo_images.SIZE)


def _open_torchvision(uri: str, scheme: str, root: Path, *, split: Split, download: bool) -> ImageSource:
    from torchvision import datasets

    class_name, arguments = _TORCHVISION[scheme]
    try:
        with warnings.catch_warnings():
            # NumPy 2.4 dislikes how CIFAR's old pickles spell a dtype.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            dataset = getattr(datasets, class_name)(root, download=download, **arguments[split])
    except ImportError as complaint:
        raise DataError(
            f"reading {scheme} needs the package '{complaint.name}'", hint=f"pip install {complaint.name}"
        ) from complaint
    except Exception as complaint:
        if download:
            raise DataError(
                f"{scheme} could not be fetched: {complaint}", where={"into": root}, hint="try again later"
            ) from complaint
        raise DataError(
            f"{scheme} is not there, or its files are not whole",
            where={"place": root},
            hint="--download lets torchvision fetch it",
        ) from complaint
    labels = _torchvision_labels(dataset)
    classes = getattr(dataset, "classes", None) or [str(label) for label in range(int(labels.max()) + 1)]
    return ImageSource(
        uri=uri,
        fingerprint=_sha256(f"{scheme} {split} {len(dataset)}"),
        length=len(dataset),
        opener=lambda index: dataset[index][0],
        namer=lambda index: f"{scheme} {split} {index}",
        classes=tuple(str(name) for name in classes),
        labels=labels,
    )


def _torchvision_labels(dataset: Any) -> Labels:
    # Each set keeps its labels under another name; reading them through items would decode every image.
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name), dtype=np.int64)
    return np.array([dataset[index][1] for index in range(len(dataset))], dtype=np.int64)


def _open_folder(uri: str, root: Path) -> ImageSource:
    try:
        sizes = _find_images(root)
    except OSError as complaint:
        raise DataError(
            f"the folder '{uri}' cannot be read: {complaint.strerror}", where={"place": complaint.filename}
        ) from complaint
    if not sizes:
        raise DataError(f"no images in the folder '{uri}'", hint="looked for " + ", ".join(EXTENSIONS))
    names = sorted(sizes)
    classes, labels = _classes_from_names(uri, names)
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{sizes[name]}\n".encode(errors="surrogateescape"))
    return ImageSource(
        uri=uri,
        fingerprint=digest.hexdigest(),
        length=len(names),
        opener=lambda index: _open_file(root / names[index]),
        namer=lambda index: str(root / names[index]),
        classes=classes,
        labels=labels,
    )


def _find_images(root: Path) -> dict[str, int]:
    """Return relative name (with slashes) -> bytes of every image below a folder."""
    found: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    # Linked folders wait until all real ones are seen: a link to a folder inside the root then adds
    # nothing, and a loop ends.
    real, linked = [(str(root), "")], list[tuple[str, str]]()
    while real or linked:
        folder, prefix = real.pop() if real else linked.pop(0)
        status = os.stat(folder)  # noqa: PTH116 - millions of names; plain strings are far quicker
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    (linked if entry.is_symlink() else real).append((entry.path, f"{prefix}{entry.name}/"))
                elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                    found[prefix + entry.name] = entry.stat().st_size
    return found


def _classes_from_names(uri: str, names: list[str]) -> tuple[tuple[str, ...] | None, Labels | None]:
    if not all("/" in name for name in names):
        return None, None
    folders = [name.partition("/")[0] for name in names]
    classes = sorted(set(folders))
    if len(classes) < 2:
        return None, None
    if _SPLIT_FOLDERS.issuperset(classes):
        raise DataError(
            f"the folder '{uri}' holds the splits {' and '.join(classes)}, not classes",
            hint=f"pass one of them: {Path(uri) / ('train' if 'train' in classes else classes[0])}",
        )
    positions = {name: position for position, name in enumerate(classes)}
    return tuple(classes), np.array([positions[folder] for folder in folders], dtype=np.int64)


def _open_file(path: Path) -> Image.Image:
    if path.stat().st_size == 0:
        raise UnreadableImage("empty file")
    return Image.open(path)


def _exif_turn(image: Image.Image) -> Image.Transpose | None:
    # A picture with broken EXIF is still a picture; ImageOps.exif_transpose would rewrite the EXIF and fail.
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert() would clip 16 bits to 8 instead of scaling them.
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _reason(complaint: Exception) -> str:
    if isinstance(complaint, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(complaint, FileNotFoundError):
        return "the file is gone"
    return str(complaint) or type(complaint).__name__


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
