"""Where images come from: a folder, the embedded demo set, or a torchvision set."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgecl.data.index import EXTENSIONS, Memory, list_folder
from edgecl.errors import DataError, near_matches
from edgecl.storage.redaction import without_secrets

# No honest picture is larger.
_LARGEST_FILE = 2**30
# What the README lists. Pillow knows dozens more, and hands some of them to other programs (PostScript to Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

Split = Literal["train", "test"]
Labels = NDArray[np.int64]

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
    "fashion-mnist:PATH": "Fashion-MNIST through torchvision: 60,000 grayscale images of 28 px, 10 classes",
    "flowers102:PATH": "Oxford Flowers through torchvision: 1,020 images, 102 classes",
    "stl10:PATH": "STL-10's labelled part through torchvision: 5,000 images of 96 px, 10 classes",
    "shards:PATTERN": "WebDataset tar files on disk, behind https:// or s3://; train-{000000..000127}.tar",
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
SIDES_SWAP = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}

_SPLIT_FOLDERS = {"train", "training", "test", "testing", "val", "valid", "validation"}


class UnreadableImage(Exception):  # noqa: N818 - a condition that the loader counts, not an error of edgecl's
    """One image that cannot be decoded; the loader counts, names and skips it.

    Args:
        reason: what is wrong with it.
        lasting: whether the file itself is at fault, so that it stays unreadable until it changes.
    """

    def __init__(self, reason: str = "", *, lasting: bool = False):
        super().__init__(reason)
        self.lasting = lasting


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images by index, with labels where there are any."""

    uri: str
    fingerprint: str
    """sha256 over a folder's names and sizes in bytes, or a set's name, split and length."""
    length: int
    opener: Callable[[int], Image.Image] | None = field(repr=False)
    """Index -> picture as stored, of any mode, not necessarily decoded yet; not needed where `reader` is."""
    namer: Callable[[int], str] = field(repr=False)
    classes: tuple[str, ...] | None = None
    labels: Labels | None = field(default=None, repr=False)
    """(N,) positions in `classes`."""
    order: Callable[[int, int, NDArray[np.int64]], NDArray[np.int64]] | None = field(default=None, repr=False)
    """(seed, epoch, (M,) images that take part) -> (M,) positions among these, shuffled so that reading stays local;
    None where any order costs the same."""
    reader: Callable[[int], bytes] | None = field(default=None, repr=False)
    """Index -> the bytes of its file, where pictures are files; raises OSError or UnreadableImage."""
    memory: Memory | None = field(default=None, repr=False)
    """Of the files that were unreadable before, where an index is kept."""

    def __len__(self) -> int:
        """Count the images, unreadable ones included."""
        return self.length

    def describe(self, index: int) -> str:
        """Name an image as a person would look for it: its path, or 'cifar10 train 17'."""
        return self.namer(index)

    def take(self, indices: NDArray[np.int64]) -> ImageSource:
        """Return a source of the images at (M,) indices, in that order."""
        order, opener, reader = self.order, self.opener, self.reader
        return replace(
            self,
            fingerprint=_sha256(f"{self.fingerprint} {indices.tolist()}"),
            length=len(indices),
            opener=opener and (lambda index: opener(int(indices[index]))),
            reader=reader and (lambda index: reader(int(indices[index]))),
            memory=None,
            namer=lambda index: self.namer(int(indices[index])),
            labels=None if self.labels is None else self.labels[indices],
            order=order and (lambda seed, epoch, chosen: order(seed, epoch, indices[chosen])),
        )

    def read(self, index: int) -> Image.Image:
        """Decode one image to RGB, the right way up, transparent parts white.

        Raises:
            UnreadableImage: truncated, corrupt, empty, gone, or too large to be honest.
        """
        return self._decode(index, at_least=None)[0]

    def read_reduced(
        self, index: int, at_least: int, *, content: bytes | None = None
    ) -> tuple[Image.Image, int, int]:
        """Decode one image like `read`, where the format allows it at a reduced scale.

        Args:
            index: which image.
            at_least: pixels that both sides keep, if they had them.
            content: its file, where `read_bytes` has read it already.

        Returns:
            The picture, and the true height and width it would have had in full.

        Raises:
            UnreadableImage: as in `read`.
        """
        return self._decode(index, at_least=at_least, content=content)

    def read_bytes(self, index: int) -> bytes | None:
        """Read the file of one image; None where the images are no files.

        Raises:
            UnreadableImage: empty, gone or out of reach.
        """
        if self.reader is None:
            return None
        try:
            content = self.reader(index)
        except UnreadableImage:
            raise
        except Exception as exc:
            raise UnreadableImage(_reason(exc)) from exc
        if not content:
            raise UnreadableImage("empty file", lasting=True)
        return content

    def _decode(
        self, index: int, *, at_least: int | None, content: bytes | None = None
    ) -> tuple[Image.Image, int, int]:
        content = content or self.read_bytes(index)
        # Decoders meet every kind of broken file with every kind of exception.
        try:
            with self._open(index, content) as image:
                width, height = image.size
                if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
                    raise UnreadableImage(f"{width} x {height} pixels is suspiciously large")
                if at_least is not None:
                    image.draft(None, (at_least, at_least))
                image.load()
                turn = exif_turn(image)
                if turn in SIDES_SWAP:
                    width, height = height, width
                return _rgb(image if turn is None else image.transpose(turn)), height, width
        except UnreadableImage:
            raise
        except Exception as exc:
            # What was read is at fault, unless there was no room to decode it.
            lasting = content is not None and not isinstance(exc, MemoryError)
            raise UnreadableImage(_reason(exc), lasting=lasting) from exc

    def _open(self, index: int, content: bytes | None) -> Image.Image:
        if content is not None:
            return open_picture(content)
        assert self.opener is not None
        return self.opener(index)


def open_source(
    uri: str, *, split: Split = "train", download: bool = False, index_dir: Path | None = None
) -> ImageSource:
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
        index_dir: where the index of a folder is kept, so that the next start need not read all of it.

    Raises:
        DataError: unknown, missing or empty; or a test split asked of a folder.
    """
    if uri == "demo":
        return _open_demo(split)
    try:
        return _open_place(uri, split=split, download=download, index_dir=index_dir)
    except OSError as exc:
        raise DataError(
            f"'{without_secrets(uri)}' cannot be read: {exc.strerror or exc}",
            where={"place": exc.filename} if exc.filename else None,
        ) from exc


def _open_place(uri: str, *, split: Split, download: bool, index_dir: Path | None) -> ImageSource:
    scheme, colon, path = uri.partition(":")
    if scheme in _TORCHVISION:
        if not path:
            raise DataError(f"'{uri}' needs a place on disk", hint=f"write {scheme}:PATH")
        return _open_torchvision(uri, scheme, expanded(path), split=split, download=download)
    if colon and scheme == "shards":
        from edgecl.data.shards import open_shards

        return open_shards(uri, split=split)
    root = expanded(uri)
    if root.is_dir():
        if split == "test":
            raise DataError(
                f"the folder '{uri}' has no test split", hint="name a second folder with the held-out images"
            )
        return _open_folder(uri, root, index_dir)
    if root.exists():
        hint = f"write shards:{uri}" if root.suffix == ".tar" else f"pass the folder: {root.parent}"
        raise DataError(f"'{uri}' is a file, not a folder of images", hint=hint)
    if "://" in uri:
        shown = without_secrets(uri)
        raise DataError(
            f"'{shown}' is a URL, and folders of images are read from disks",
            hint=f"for tar shards behind it write shards:{shown}",
        )
    if colon and scheme.replace("-", "").replace("_", "").isalnum():
        raise DataError(
            f"unknown kind of data '{scheme}' in '{uri}'",
            hint=near_matches(scheme.lower(), [*_TORCHVISION, "shards"]),
        )
    raise DataError(f"no folder '{uri}'", hint="a data URI is one of: " + ", ".join(_SUMMARIES))


def folder_of(uri: str) -> Path | None:
    """Return the folder of pictures that a data URI names; None where it names none: `demo` beside a folder `demo`, too."""
    scheme = uri.partition(":")[0]
    if uri == "demo" or scheme in (*_TORCHVISION, "shards"):
        return None
    root = expanded(uri)
    return root if root.is_dir() else None


def expanded(path: str) -> Path:
    """Return a path with the home of `~` or `~NAME` in its place.

    Raises:
        DataError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as exc:
        raise DataError(
            f"'{path}' begins with a user who has no home here", hint="write ./~ for a name"
        ) from exc


def open_picture(content: bytes) -> Image.Image:
    """Open a picture of one of the formats edgecl reads; no other is tried, whatever the file is called.

    Raises:
        UnidentifiedImageError: it is of none of them.
    """
    return Image.open(io.BytesIO(content), formats=_FORMATS)


def absolute_uri(uri: str) -> str:
    """Return a data URI that means the same from any working directory, for records that others read later."""
    scheme, separator, path = uri.partition(":")
    if separator and scheme in _TORCHVISION:
        return f"{scheme}:{Path(path).absolute()}"
    if separator and scheme == "shards":
        from edgecl.data.shards import absolute_shards

        return absolute_shards(uri)
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
    options = dict(arguments[split])
    if scheme == "flowers102":
        # The one set whose pictures are files; torchvision holds the folder to no sum, and would open them as anything.
        options["loader"] = lambda path: open_picture(read_plain_file(str(path)))
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


def _open_folder(uri: str, root: Path, index_dir: Path | None) -> ImageSource:
    try:
        listing, memory = list_folder(root, index_dir=index_dir)
    except OSError as exc:
        raise DataError(
            f"the folder '{uri}' cannot be read: {exc.strerror}", where={"place": exc.filename}
        ) from exc
    names = listing.names
    if not names:
        raise DataError(f"no images in the folder '{uri}'", hint="looked for " + ", ".join(EXTENSIONS))
    classes, labels = _classes_from_names(uri, names)
    return ImageSource(
        uri=uri,
        fingerprint=listing.fingerprint,
        length=len(names),
        opener=None,
        reader=lambda index: read_plain_file(f"{root}/{names[index]}"),
        namer=lambda index: str(root / names[index]),
        classes=classes,
        labels=labels,
        memory=memory,
    )


def read_plain_file(path: str) -> bytes:
    """Read a file; a Path for each picture would enter the name of each into Python's table of strings, which grows.

    What was a picture when the folder was listed may since have become a pipe, which would block, or a file without end.

    Raises:
        OSError: it is gone or out of reach.
        UnreadableImage: no file, or too large to be honest.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("no longer a file", lasting=True)
        if status.st_size > _LARGEST_FILE:
            raise UnreadableImage(f"{status.st_size / 2**30:.1f} GiB are suspiciously much", lasting=True)
        return file.read(status.st_size)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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


def exif_turn(image: Image.Image) -> Image.Transpose | None:
    """Return what sets a picture upright that was stored turned; None where nothing is to be done."""
    # A picture with broken EXIF is still a picture; ImageOps.exif_transpose would rewrite the EXIF and fail.
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert() would clip 16 bits to 8 instead of scaling them.
        grayscale = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(np.rint(grayscale).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _reason(exc: Exception) -> str:
    if isinstance(exc, UnidentifiedImageError):
        return "not a JPEG, PNG, WebP or BMP file"
    if isinstance(exc, FileNotFoundError):
        return "the file is gone"
    return str(exc) or type(exc).__name__


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
