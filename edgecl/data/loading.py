"""Batches whose order is a function of (seed, epoch), and pictures decoded for training and for tests.

For training every picture is decoded *whole* to one square canvas, and its true height and width are kept
beside it: the random crop on the device works in true proportions, so nothing of a wide picture is lost
and nothing is distorted.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edgecl.data.randomness import permutation
from edgecl.data.sources import ImageSource, Labels, UnreadableImage
from edgecl.errors import DataError
from edgecl.progress import Progress

Indices = NDArray[np.int64]

_T = TypeVar("_T")

_READ_AHEAD_BATCHES = 3
_CHUNK = 32
_NAMED_BAD_IMAGES = 5


class Batch(NamedTuple):
    """Pictures on their way to the views."""

    indices: Indices
    """(n,) positions in the data: what all randomness of a picture hangs on."""
    canvases: Tensor
    """(n, 3, S, S) uint8: whole pictures, squeezed to squares."""
    sizes: Tensor
    """(n, 2) int32 on the CPU: true height and width, pixels."""


class EvalImages(NamedTuple):
    """Pictures to measure a net with, all in memory."""

    images: Tensor
    """(N, 3, H, W) uint8."""
    labels: Tensor | None
    """(N,) int64."""
    skipped: tuple[str, ...]
    """Names of the unreadable ones."""


def canvas(image: Image.Image, side: int) -> Tensor:
    """Squeeze a whole picture to a square, antialiased bilinear; one of that size already stays as it is.

    Returns:
        (3, side, side) uint8.
    """
    return _tensor(_resized(image, side, side))


def eval_image(image: Image.Image, *, resize_size: int, image_size: int) -> Tensor:
    """Resize the shorter side, then crop the centre: torchvision's Resize and CenterCrop.

    Args:
        image: RGB, any size; small ones are enlarged.
        resize_size: shorter side before the crop, pixels, >= image_size.
        image_size: side of the crop, pixels.

    Returns:
        (3, image_size, image_size) uint8.
    """
    width, height = image.size
    if width <= height:
        width, height = resize_size, resize_size * height // width
    else:
        width, height = resize_size * width // height, resize_size
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    image = _resized(image, width, height)
    return _tensor(image.crop((left, top, left + image_size, top + image_size)))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale 0..255 to 0..1, then subtract the mean and divide by the standard deviation of each channel.

    Args:
        images: (N, 3, H, W) uint8.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.

    Returns:
        (N, 3, H, W) float32 on the same device.
    """
    centre = torch.tensor(mean, dtype=torch.float32, device=images.device).view(3, 1, 1)
    spread = torch.tensor(std, dtype=torch.float32, device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(centre).div_(spread)


def choose_images(labels: Labels | None, length: int, limit: int | None) -> Indices:
    """Choose so many of the images, always the same: an even share of each class where there are classes.

    Returns:
        (min(length, limit),) positions, ascending.
    """
    if limit is None or limit >= length:
        return np.arange(length, dtype=np.int64)
    order = permutation(0, 0, length, stream="limit")
    if labels is None:
        return np.sort(order[:limit])
    place = _place_in_class(labels[order])
    # Every class's first image, then every class's second, …
    return np.sort(order[np.lexsort((labels[order], place))[:limit]])


def split_holdout(labels: Labels, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Split labelled images in two, each class in the same proportion.

    Args:
        labels: (N,) classes.
        fraction: of each class that is held out, 0 < fraction < 1; at least one image of every class
            stays, and of every class with two or more at least one is held out.
        seed: another seed, another split.

    Returns:
        Positions that stay and positions held out, both ascending.

    Raises:
        DataError: nothing can be held out.
    """
    order = permutation(seed, 0, len(labels), stream="holdout")
    shuffled = labels[order]
    classes, inverse, counts = np.unique(shuffled, return_inverse=True, return_counts=True)
    in_class = counts[inverse]
    quota = np.clip(np.rint(in_class * fraction), 1, None)
    held = _place_in_class(shuffled) < np.minimum(quota, in_class - 1)
    if not held.any():
        raise DataError(
            f"no images can be held out: {len(labels)} images in {len(classes)} classes",
            hint="a class needs two images or more",
        )
    return np.sort(order[~held]), np.sort(order[held])


class BadImages:
    """The unreadable images met so far; too many of them are an error."""

    def __init__(self, source: ImageSource, *, total: int, max_bad_fraction: float):
        self._source = source
        self._total = total
        self._max_bad_fraction = max_bad_fraction
        self._reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Count them."""
        return len(self._reasons)

    def __contains__(self, index: int) -> bool:
        """Say whether an image of the source is known to be unreadable."""
        return index in self._reasons

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the unreadable images, in the order of the data."""
        with self._lock:
            return tuple(self._source.describe(index) for index in sorted(self._reasons))

    def add(self, index: int, reason: str) -> None:
        """Count an image; any thread may."""
        with self._lock:
            self._reasons[index] = reason

    def check(self) -> None:
        """Hold the number of unreadable images to what is allowed.

        Raises:
            DataError: all are unreadable, or more than the allowed fraction.
        """
        with self._lock:
            reasons = sorted(self._reasons.items())
        bad = len(reasons)
        if bad == 0 or (bad < self._total and bad / self._total <= self._max_bad_fraction):
            return
        listed = [
            f"{self._source.describe(index)} ({reason})" for index, reason in reasons[:_NAMED_BAD_IMAGES]
        ]
        if bad > _NAMED_BAD_IMAGES:
            listed.append(f"and {bad - _NAMED_BAD_IMAGES} more")
        # One below the other, in line with the first.
        where = {"data": self._source.uri, "unreadable": ("\n" + " " * len("  unreadable: ")).join(listed)}
        if bad == self._total:
            raise DataError(f"none of the {self._total} images can be read", where=where)
        raise DataError(
            f"{bad} of {self._total} images cannot be read: {bad / self._total:.1%}, "
            f"{self._max_bad_fraction:.1%} are allowed",
            where=where,
            hint="repair or remove them, or raise [data] max_bad_fraction",
        )


def say_skipped(names: Sequence[str], uri: str) -> None:
    """Name on stderr the pictures that could not be read and are left out."""
    if names:
        named = ", ".join(names[:_NAMED_BAD_IMAGES]) + (" …" if len(names) > _NAMED_BAD_IMAGES else "")
        sys.stderr.write(f"edgecl: {len(names)} unreadable images of '{uri}' left out: {named}\n")


class TrainingImages:
    """All pictures of a source as canvases: in memory where they fit, else decoded as batches are asked for.

    Both ways give the same batches, except that in memory unreadable images are left out at once, and
    otherwise each is replaced, when it is met, by the next readable one.

    Args:
        source: where the pictures come from.
        canvas_size: side of the canvases, pixels.
        cache_mib: memory for canvases; 0 decodes for every batch.
        max_bad_fraction: of the pictures that may be unreadable.
        workers: decoding threads; 0 decodes in the caller's.
        limit: use only so many pictures, chosen by `choose_images`.

    Raises:
        DataError: too many pictures are unreadable.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        canvas_size: int,
        cache_mib: int = 4096,
        max_bad_fraction: float = 0.01,
        workers: int = 2,
        limit: int | None = None,
    ):
        self.source = source
        self.canvas_size = canvas_size
        self._workers = workers
        self._device = torch.device("cpu")
        self._chosen = choose_images(source.labels, len(source), limit)
        self._bad = BadImages(source, total=len(self._chosen), max_bad_fraction=max_bad_fraction)
        self._cache: tuple[Tensor, Tensor] | None = None
        if 3 * canvas_size**2 * len(self._chosen) <= cache_mib * 2**20:
            self._cache = self._read_everything()

    def __len__(self) -> int:
        """Count the pictures; of cached ones, the readable."""
        return len(self._chosen)

    @property
    def labels(self) -> Labels | None:
        """(N,) class of each picture, in the order that `Batch.indices` count."""
        return None if self.source.labels is None else self.source.labels[self._chosen]

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the unreadable pictures met so far."""
        return self._bad.names

    @property
    def is_cached(self) -> bool:
        """Whether all canvases are in memory."""
        return self._cache is not None

    def to(self, device: torch.device | str) -> TrainingImages:
        """Give batches on a device; canvases in memory move there now."""
        self._device = torch.device(device)
        if self._cache is not None:
            canvases, sizes = self._cache
            self._cache = canvases.to(self._device), sizes
        return self

    def steps_per_epoch(self, batch_size: int) -> int:
        """Count the whole batches of an epoch.

        Raises:
            DataError: a batch is larger than the data.
        """
        if batch_size > len(self):
            raise DataError(
                f"a batch of {batch_size:,} is larger than the data: {len(self):,} images",
                where={"data": self.source.uri},
                hint=f"set [data] batch_size to {len(self)} or less, or bring more images",
            )
        return len(self) // batch_size

    def batches(
        self,
        seed: int,
        epoch: int,
        *,
        batch_size: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """Go through an epoch in its shuffled order; the last partial batch is dropped.

        Args:
            seed: of the run.
            epoch: 0-based; each has its own order.
            batch_size: images per step, over all processes.
            start_step: steps of this epoch already done.
            rank: this process.
            world_size: processes; each gets its own consecutive part of every batch.

        Raises:
            DataError: a batch is larger than the data or cannot be shared evenly; or, on the way, too many
                pictures are unreadable.
        """
        steps = self.steps_per_epoch(batch_size)
        if batch_size % world_size:
            raise DataError(
                f"a batch of {batch_size} cannot be shared evenly by {world_size} processes",
                hint=f"set [data] batch_size to a multiple of {world_size}",
            )
        share = batch_size // world_size
        order = permutation(seed, epoch, len(self))[: steps * batch_size]
        parts = order.reshape(steps, world_size, share)[start_step:, rank]
        return self._cached_batches(self._cache, parts) if self._cache else self._streamed_batches(parts)

    def _cached_batches(self, cache: tuple[Tensor, Tensor], parts: Iterable[Indices]) -> Iterator[Batch]:
        canvases, sizes = cache
        for indices in parts:
            rows = torch.from_numpy(indices)
            yield Batch(indices, canvases[rows.to(canvases.device)], sizes[rows])

    def _streamed_batches(self, parts: Iterable[Indices]) -> Iterator[Batch]:
        for pieces in _in_threads(self._read_some, parts, threads=self._workers, ahead=_READ_AHEAD_BATCHES):
            indices, canvases, sizes = zip(*(picture for piece in pieces for picture in piece), strict=True)
            yield Batch(
                np.array(indices, dtype=np.int64),
                torch.stack(canvases).to(self._device, non_blocking=True),
                torch.tensor(sizes, dtype=torch.int32),
            )

    def _read_some(self, indices: Indices) -> list[tuple[int, Tensor, tuple[int, int]]]:
        return [self._read_or_next(int(index)) for index in indices]

    def _read_or_next(self, index: int) -> tuple[int, Tensor, tuple[int, int]]:
        while True:
            try:
                return index, *self._read(index)
            except UnreadableImage:
                self._bad.check()
                index = (index + 1) % len(self)

    def _read(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        place = int(self._chosen[index])
        if place in self._bad:
            raise UnreadableImage
        try:
            # Twice the side, as in Pillow's thumbnail(): JPEG's own scaling is coarse.
            image, height, width = self.source.read_reduced(place, at_least=2 * self.canvas_size)
        except UnreadableImage as complaint:
            self._bad.add(place, str(complaint))
            raise
        return canvas(image, self.canvas_size), (height, width)

    def _read_everything(self) -> tuple[Tensor, Tensor]:
        canvases = torch.empty((len(self), 3, self.canvas_size, self.canvas_size), dtype=torch.uint8)
        sizes = torch.empty((len(self), 2), dtype=torch.int32)
        readable: list[int] = []
        for index, picture in _read_all(self._read, len(self), threads=_cores()):
            if picture is not None:
                canvases[len(readable)] = picture[0]
                sizes[len(readable)] = torch.tensor(picture[1])
                readable.append(index)
        self._bad.check()
        say_skipped(self._bad.names, self.source.uri)
        self._chosen = self._chosen[readable]
        return canvases[: len(readable)], sizes[: len(readable)]


def load_eval_images(
    source: ImageSource,
    *,
    resize_size: int,
    image_size: int,
    max_bad_fraction: float = 0.01,
    limit: int | None = None,
) -> EvalImages:
    """Decode pictures as a net will be tested with them.

    Args:
        source: where the pictures come from.
        resize_size: shorter side before the centre crop, pixels.
        image_size: side of the crop, pixels.
        max_bad_fraction: of the pictures that may be unreadable.
        limit: use only so many pictures, chosen by `choose_images`.

    Raises:
        DataError: too many pictures are unreadable.
    """
    chosen = choose_images(source.labels, len(source), limit)
    bad = BadImages(source, total=len(chosen), max_bad_fraction=max_bad_fraction)

    def read(index: int) -> Tensor:
        place = int(chosen[index])
        try:
            return eval_image(source.read(place), resize_size=resize_size, image_size=image_size)
        except UnreadableImage as complaint:
            bad.add(place, str(complaint))
            raise

    images = torch.empty((len(chosen), 3, image_size, image_size), dtype=torch.uint8)
    readable: list[int] = []
    for index, image in _read_all(read, len(chosen), threads=_cores()):
        if image is not None:
            images[len(readable)] = image
            readable.append(index)
    bad.check()
    labels = None if source.labels is None else torch.from_numpy(source.labels[chosen[readable]])
    return EvalImages(images[: len(readable)], labels, bad.names)


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def _place_in_class(labels: Labels) -> Indices:
    """Count, for each image, the earlier images of its class."""
    by_class = np.argsort(labels, kind="stable")
    grouped = labels[by_class]
    place = np.empty(len(labels), dtype=np.int64)
    place[by_class] = np.arange(len(labels)) - np.searchsorted(grouped, grouped)
    return place


def _cores() -> int:
    return os.cpu_count() or 1


def _read_all(read: Callable[[int], _T], count: int, *, threads: int) -> Iterator[tuple[int, _T | None]]:
    """Read images 0 … count - 1 in order; an unreadable one gives None."""

    def read_some(indices: Indices) -> list[tuple[int, _T | None]]:
        pictures: list[tuple[int, _T | None]] = []
        for index in indices.tolist():
            try:
                pictures.append((index, read(index)))
            except UnreadableImage:
                pictures.append((index, None))
        return pictures

    size = _CHUNK * threads
    parts = (np.arange(start, min(start + size, count)) for start in range(0, count, size))
    with Progress("reading", total=count, unit="images") as progress:
        for pieces in _in_threads(read_some, parts, threads=threads, ahead=2):
            for piece in pieces:
                yield from piece
                progress.advance(len(piece))


def _in_threads(
    work: Callable[[Indices], _T], parts: Iterable[Indices], *, threads: int, ahead: int
) -> Iterator[list[_T]]:
    """Cut each part into pieces, one for each thread, and give the parts' results in order, working ahead."""
    if threads == 0:
        for part in parts:
            yield [work(part)]
        return
    waiting: deque[list[Future[_T]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="edgecl-decode")
    try:
        for part in parts:
            pieces = np.array_split(part, min(threads, len(part)))
            waiting.append([pool.submit(work, piece) for piece in pieces])
            if len(waiting) > ahead:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
