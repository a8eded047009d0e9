"""Images by index, whatever they come from, and how one of them is decoded."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgecl.data.index import Memory
from edgecl.errors import DataError
from edgecl.onboard.pictures import exif_turn, open_with_pillow, rgb_with_pillow

# A larger file is no picture.
_LARGEST_FILE = 2**30

Split = Literal["train", "test"]
Labels = NDArray[np.int64]

_T = Image.Transpose
SIDES_SWAP = {_T.TRANSPOSE, _T.ROTATE_270, _T.TRANSVERSE, _T.ROTATE_90}


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
    label_sets: NDArray[np.bool_] | None = field(default=None, repr=False)
    """(N, K) which of `classes` each picture is of, where it may be of several, or none; `labels` then is None."""
    order: Callable[[int, int, NDArray[np.int64]], NDArray[np.int64]] | None = field(default=None, repr=False)
    """(seed, epoch, (M,) images that take part) -> (M,) positions among these, shuffled so that reading stays local;
    None where any order costs the same."""
    reader: Callable[[int], bytes] | None = field(default=None, repr=False)
    """Index -> the bytes of its file, where pictures are files; raises OSError or UnreadableImage."""
    memory: Memory | None = field(default=None, repr=False)
    """Of the files that were unreadable before, where an index is kept."""
    sizes: NDArray[np.int64] | None = field(default=None, repr=False)
    """(N,) bytes of each file, where the pictures are those of a folder."""

    @property
    def strata(self) -> Labels | None:
        """(N,) of what a held-out part has an even share: classes, or the sizes of sets of classes; None without labels."""
        return self.labels if self.label_sets is None else self.label_sets.sum(1, dtype=np.int64)

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
            fingerprint=sha256_of(f"{self.fingerprint} {indices.tolist()}"),
            length=len(indices),
            opener=opener and (lambda index: opener(int(indices[index]))),
            reader=reader and (lambda index: reader(int(indices[index]))),
            memory=None,
            namer=lambda index: self.namer(int(indices[index])),
            labels=None if self.labels is None else self.labels[indices],
            label_sets=None if self.label_sets is None else self.label_sets[indices],
            sizes=None if self.sizes is None else self.sizes[indices],
            order=order and (lambda seed, epoch, chosen: order(seed, epoch, indices[chosen])),
        )

    def read(self, index: int) -> Image.Image:
        """Decode one image to RGB, the right way up, transparent parts white.

        Raises:
            UnreadableImage: truncated, corrupt, empty, gone, or suspiciously large.
        """
        return self.read_reduced(index, at_least=None)[0]

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

    def read_reduced(
        self, index: int, at_least: int | None, *, content: bytes | None = None
    ) -> tuple[Image.Image, int, int]:
        """Decode one image like `read`, where the format allows it at a reduced scale.

        Args:
            at_least: pixels that both sides keep, if they had them; None keeps all.
            content: its file, where `read_bytes` has read it already.

        Returns:
            The picture, and the true height and width it would have had in full.

        Raises:
            UnreadableImage: as in `read`.
        """
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
                return rgb_with_pillow(image if turn is None else image.transpose(turn)), height, width
        except UnreadableImage:
            raise
        except Exception as exc:
            # What was read is at fault, unless there was no room to decode it.
            lasting = content is not None and not isinstance(exc, MemoryError)
            raise UnreadableImage(_reason(exc), lasting=lasting) from exc

    def _open(self, index: int, content: bytes | None) -> Image.Image:
        if content is not None:
            picture: Image.Image = open_with_pillow(content)
            return picture
        assert self.opener is not None
        return self.opener(index)


def read_plain_file(path: str) -> bytes:
    """Read a file; a Path for each picture would enter the name of each into Python's table of strings, which grows.

    What was a picture when the folder was listed may since have become a pipe, which would block, or a file without end.

    Raises:
        OSError: it is gone or out of reach.
        UnreadableImage: no file, or suspiciously large.
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


def _reason(exc: Exception) -> str:
    if isinstance(exc, UnidentifiedImageError):
        return "not a JPEG, PNG, WebP or BMP file"
    if isinstance(exc, FileNotFoundError):
        return "the file is gone"
    return str(exc) or type(exc).__name__


def sha256_of(text: str) -> str:
    """Return the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
