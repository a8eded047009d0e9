"""Batches whose order is a function of (seed, epoch), and pictures decoded for training and for tests.

For training every picture is decoded *whole* to one square, and its true height and width are kept
beside it: the random crop on the device works in true proportions, so nothing of a wide picture is lost
and nothing is distorted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edgecl.data.decode import (
    Picture,
    PlainJpeg,
    as_tensor,
    decode_on,
    read_encoded,
    read_picture,
    refuse_without_nvjpeg,
)
from edgecl.data.randomness import permutation
from edgecl.data.source import ImageSource, Labels, UnreadableImage
from edgecl.data.threads import read_ahead
from edgecl.data.unreadable import BadImages, say_skipped
from edgecl.errors import DataError, counted
from edgecl.metrics.linear import place_in_class
from edgecl.onboard.pictures import fit
from edgecl.progress import Progress

Indices = NDArray[np.int64]

_T = TypeVar("_T")

_READ_AHEAD_BATCHES = 3
_CHUNK = 32
_READ_TIMEOUT_S = 300.0


class Batch(NamedTuple):
    """Pictures on their way to the views."""

    indices: Indices
    """(n,) positions in the data: what all randomness of a picture hangs on."""
    images: Tensor
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
    label_sets: Tensor | None
    """(N, K) float32 of zeros and ones, where a picture may be of several classes."""


def eval_image(image: Image.Image, *, resize_size: int, image_size: int) -> Tensor:
    """Resize the shorter side, then crop the center, as devices do: torchvision's Resize and CenterCrop.

    Args:
        image: RGB, any size; small ones are enlarged.
        resize_size: shorter side before the crop, pixels, >= image_size.
        image_size: side of the crop, pixels.

    Returns:
        (3, image_size, image_size) uint8.
    """
    return as_tensor(fit(image, resize_size=resize_size, image_size=image_size))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale 0..255 to 0..1, then subtract the mean and divide by the standard deviation of each channel.

    Args:
        images: (N, 3, H, W) uint8.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.

    Returns:
        (N, 3, H, W) float32 on the same device.
    """
    center = torch.tensor(mean, dtype=torch.float32, device=images.device).view(3, 1, 1)
    spread = torch.tensor(std, dtype=torch.float32, device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(center).div_(spread)


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
    place = place_in_class(labels[order])
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
    held = place_in_class(shuffled) < np.minimum(quota, in_class - 1)
    if not held.any():
        raise DataError(
            f"no images can be held out: {len(labels)} images in {len(classes)} classes",
            hint="a class needs two images or more",
        )
    return np.sort(order[~held]), np.sort(order[held])


class TrainingImages:
    """All pictures of a source, decoded: in memory where they fit, else decoded as batches are asked for.

    Both ways give the same batches, except that in memory unreadable images are left out at once, and
    otherwise each is replaced, when it is met, by the next readable one.

    Args:
        decode_size: side of the squares to which pictures are decoded, pixels.
        cache_mib: memory for decoded pictures; 0 decodes for every batch.
        max_bad_fraction: of the pictures that may be unreadable.
        workers: decoding threads; 0 decodes in one thread, and only what was asked for.
        limit: use only so many pictures, chosen by `choose_images`.
        decode: where plain JPEGs are decoded that are not in memory; 'cuda' gives slightly other pixels.
        read_timeout_s: longest wait for a batch.
        left_out: names of pictures to leave out, where all are read into memory: those an earlier start could not
            read, so that the others keep their places.

    Raises:
        DataError: too many pictures are unreadable, or reading one takes too long.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        decode_size: int,
        cache_mib: int = 4096,
        max_bad_fraction: float = 0.01,
        workers: int = 2,
        limit: int | None = None,
        decode: Literal["cpu", "cuda"] = "cpu",
        read_timeout_s: float = _READ_TIMEOUT_S,
        left_out: Collection[str] = (),
    ):
        self.source = source
        self.decode_size = decode_size
        self._workers = workers
        self._decode = decode
        self._read_timeout_s = read_timeout_s
        self._instead: dict[int, int] = {}
        self._device = torch.device("cpu")
        self._chosen = choose_images(source.labels, len(source), limit)
        fits = 3 * decode_size**2 * len(self._chosen) <= cache_mib * 2**20
        self._bad = BadImages(
            source,
            chosen=self._chosen,
            max_bad_fraction=max_bad_fraction,
            left_out=left_out if fits else (),
            setting="[data] max_bad_fraction",
        )
        self._cache: tuple[Tensor, Tensor] | None = self._read_everything() if fits else None

    def __len__(self) -> int:
        """Count the pictures; of cached ones, the readable."""
        return len(self._chosen)

    @property
    def labels(self) -> Labels | None:
        """(N,) class of each picture, in the order that `Batch.indices` count."""
        return None if self.source.labels is None else self.source.labels[self._chosen]

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the unreadable pictures known so far."""
        return self._bad.names

    @property
    def is_cached(self) -> bool:
        """Whether all decoded pictures are in memory."""
        return self._cache is not None

    def to(self, device: torch.device | str) -> TrainingImages:
        """Move batches to a device, those in memory now.

        Raises:
            DeviceError: JPEGs are to be decoded there, and cannot be.
        """
        self._device = torch.device(device)
        if self._decode == "cuda":
            refuse_without_nvjpeg(self._device)
        if self._cache is not None:
            images, sizes = self._cache
            self._cache = images.to(self._device), sizes
        return self

    def steps_per_epoch(self, batch_size: int) -> int:
        """Count the whole batches of an epoch.

        Raises:
            DataError: a batch is larger than the data.
        """
        if batch_size > len(self):
            raise DataError(
                f"a batch of {batch_size:,} is larger than the data: {counted(len(self), 'image')}",
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
            world_size: processes, which share batches evenly; each gets its own consecutive part of every batch.

        Raises:
            DataError: a batch is larger than the data; or, on the way, too many pictures are unreadable.
        """
        steps = self.steps_per_epoch(batch_size)
        share = batch_size // world_size
        order = self._order(seed, epoch)[: steps * batch_size]
        parts = order.reshape(steps, world_size, share)[start_step:, rank]
        return self._cached_batches(self._cache, parts) if self._cache else self._streamed_batches(parts)

    def in_order(self, rows: Indices, *, batch_size: int) -> Iterator[Batch]:
        """Go through these rows of the pictures, in their order; the last batch may be smaller.

        Raises:
            DataError: on the way, too many are unreadable.
        """
        parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        return self._cached_batches(self._cache, parts) if self._cache else self._streamed_batches(parts)

    def _order(self, seed: int, epoch: int) -> Indices:
        if self.source.order is None:
            return permutation(seed, epoch, len(self))
        return self.source.order(seed, epoch, self._chosen)

    def _cached_batches(self, cache: tuple[Tensor, Tensor], parts: Iterable[Indices]) -> Iterator[Batch]:
        images, sizes = cache
        for indices in parts:
            rows = torch.from_numpy(indices)
            yield Batch(indices, images[rows.to(images.device, non_blocking=True)], sizes[rows])

    def _streamed_batches(self, parts: Iterable[Indices]) -> Iterator[Batch]:
        read = partial(self._read_or_next, encoded=self._decode == "cuda")
        try:
            for found in read_ahead(
                read,
                parts,
                threads=max(1, self._workers),
                ahead=_READ_AHEAD_BATCHES if self._workers else 0,
                wait_s=self._read_timeout_s,
                stalled=self._stalled,
            ):
                found, images = self._on_device(found)
                yield Batch(
                    np.array([index for index, _ in found], dtype=np.int64),
                    images,
                    torch.tensor([(one.height, one.width) for _, one in found], dtype=torch.int32),
                )
        finally:
            self._bad.remember()

    def _on_device(
        self, found: list[tuple[int, Picture | PlainJpeg]]
    ) -> tuple[list[tuple[int, Picture | PlainJpeg]], Tensor]:
        jpegs = {row: one for row, (_, one) in enumerate(found) if isinstance(one, PlainJpeg)}
        decoded = decode_on(self._device, [*jpegs.values()], self.decode_size) if jpegs else None
        if jpegs and decoded is None:
            # One of them is damaged, or of a kind that a GPU does not know: the processor tells which.
            found = [
                self._read_or_next(index) if row in jpegs else (index, one)
                for row, (index, one) in enumerate(found)
            ]
            jpegs = {}
        shape = (len(found), 3, self.decode_size, self.decode_size)
        others = [row for row in range(len(found)) if row not in jpegs]
        # Only from pinned memory is a copy to a GPU left to itself.
        staged = torch.empty(
            (len(others), *shape[1:]), dtype=torch.uint8, pin_memory=self._device.type == "cuda"
        )
        for square, row in zip(staged, others, strict=True):
            one = found[row][1]
            assert isinstance(one, Picture)
            square.copy_(one.pixels)
        moved = staged.to(self._device, non_blocking=True)
        if decoded is None:
            return found, moved
        images = torch.empty(shape, dtype=torch.uint8, device=self._device)
        images[list(jpegs)] = decoded
        images[others] = moved
        return found, images

    def _read_or_next(self, index: int, *, encoded: bool = False) -> tuple[int, Picture | PlainJpeg]:
        first = index
        while True:
            try:
                return index, self._read(index, encoded=encoded)
            except UnreadableImage:
                self._bad.check()
                index = self._instead[first] = (index + 1) % len(self)

    def _read(self, index: int, *, encoded: bool = False) -> Picture | PlainJpeg:
        read = read_encoded if encoded else read_picture
        return self._bad.read(
            int(self._chosen[index]), lambda place: read(self.source, place, self.decode_size)
        )

    def _stalled(self, index: int, seconds: float) -> DataError:
        place = int(self._chosen[self._instead.get(index, index)])
        return _too_slow(self.source, place, seconds=seconds, limit_s=self._read_timeout_s)

    def _read_everything(self) -> tuple[Tensor, Tensor]:
        images = torch.empty((len(self), 3, self.decode_size, self.decode_size), dtype=torch.uint8)
        sizes = torch.empty((len(self), 2), dtype=torch.int32)

        def keep(place: int, picture: Picture | PlainJpeg) -> None:
            assert isinstance(picture, Picture)
            images[place] = picture.pixels
            sizes[place] = torch.tensor((picture.height, picture.width))

        readable = _read_all(
            self._read,
            keep,
            len(self),
            bad=self._bad,
            wait_s=self._read_timeout_s,
            stalled=self._stalled,
        )
        say_skipped(self._bad.names, self.source.uri)
        self._chosen = self._chosen[readable]
        return images[: len(readable)], sizes[: len(readable)]


def load_eval_images(
    source: ImageSource,
    *,
    resize_size: int,
    image_size: int,
    max_bad_fraction: float = 0.01,
    limit: int | None = None,
    read_timeout_s: float = _READ_TIMEOUT_S,
) -> EvalImages:
    """Decode pictures as a net will be tested with them.

    Args:
        resize_size: shorter side before the center crop, pixels.
        image_size: side of the crop, pixels.
        max_bad_fraction: of the pictures that may be unreadable.
        limit: use only so many pictures, chosen by `choose_images`.
        read_timeout_s: longest wait for a few pictures.

    Raises:
        DataError: too many pictures are unreadable, or reading one takes too long.
    """
    chosen = choose_images(source.labels, len(source), limit)
    bad = BadImages(source, chosen=chosen, max_bad_fraction=max_bad_fraction)

    def read(place: int) -> Tensor:
        return eval_image(source.read(place), resize_size=resize_size, image_size=image_size)

    def stalled(index: int, seconds: float) -> DataError:
        return _too_slow(source, int(chosen[index]), seconds=seconds, limit_s=read_timeout_s)

    images = torch.empty((len(chosen), 3, image_size, image_size), dtype=torch.uint8)
    readable = _read_all(
        lambda index: bad.read(int(chosen[index]), read),
        images.__setitem__,
        len(chosen),
        bad=bad,
        wait_s=read_timeout_s,
        stalled=stalled,
    )
    source = source.take(chosen[readable])
    labels, label_sets = (
        None if part is None else torch.from_numpy(part) for part in (source.labels, source.label_sets)
    )
    sets = None if label_sets is None else label_sets.float()
    return EvalImages(images[: len(readable)], labels, bad.names, sets)


def _read_all(
    read: Callable[[int], _T],
    keep: Callable[[int, _T], None],
    count: int,
    *,
    bad: BadImages,
    wait_s: float,
    stalled: Callable[[int, float], DataError],
) -> list[int]:
    """Read images 0 … count - 1, and keep the readable ones, numbered from 0; return which they are."""

    def read_one(index: int) -> tuple[int, _T | None]:
        try:
            return index, read(index)
        except UnreadableImage:
            return index, None

    threads = os.cpu_count() or 1
    size = _CHUNK * threads
    parts = (np.arange(start, min(start + size, count)) for start in range(0, count, size))
    readable: list[int] = []
    with Progress("reading", total=count, unit="images") as progress:
        for pictures in read_ahead(read_one, parts, threads=threads, ahead=2, wait_s=wait_s, stalled=stalled):
            for index, picture in pictures:
                if picture is not None:
                    keep(len(readable), picture)
                    readable.append(index)
            progress.advance(len(pictures))
    bad.remember()
    bad.check()
    return readable


def _too_slow(source: ImageSource, place: int, *, seconds: float, limit_s: float) -> DataError:
    return DataError(
        f"no pictures for {limit_s:g} s: a file does not answer",
        where={"data": source.uri, "waiting for": f"{source.describe(place)} ({seconds:.0f} s)"},
        hint="see whether it can be copied; its disk or network share may hang, or it is no ordinary file. Then run "
        "again, or raise [data] read_timeout_s if it is only slow",
    )
