"""Look at a folder before anything is trained: sizes, unreadable files, near-duplicates, pictures that also have labels.

Near-duplicates are found by a perceptual hash of 120 bits; `imagehash` has one, of 64 bits, and brings SciPy with it
(110 MB) for a cosine transform that is a product of matrices. What the hash tells apart: docs/results.md.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgecl.data.loading import TrainingImages
from edgecl.data.source import ImageSource, UnreadableImage
from edgecl.progress import Progress
from edgecl.storage.records import Survey

MOST_READ = 5_000
"""Pictures of a folder that are read."""
# Video frames and bursts stand beside each other.
_RUN = 20

_SIDE = 32
_FREQUENCIES = 11
_SAME_BITS = 18
"""Bits of 120 in which two pictures of the same scene may differ."""
_CHUNK = 1024
# Mean difference between channels below which a picture has no color; JPEGs of gray scenes have a little.
_GRAY = 2.0
# Of files that are compared byte for byte: of those of one size, as uncompressed frames have, a part.
_MOST_BYTES = 2**33
_OPENING = 2**16  # to open a file takes as long as to read so many bytes


def survey(source: ImageSource, labelled: ImageSource | None = None) -> Survey:
    """Look at pictures, and at the labelled ones that may lie among them.

    Args:
        source: the pictures; of more than MOST_READ, runs of neighbors by name are read, evenly spread.
        labelled: other pictures, that a net is to be tested with or to learn from; of two folders all are compared byte
            for byte, and of each the pictures that are read by their looks.

    Raises:
        DataError: none can be read.
    """
    names, skipped, pixels, sizes = _read(source)
    hashes = perceptual_hash(pixels)
    shorter, longer = np.sort(sizes, axis=1).T
    leaks: dict[str, str] = {}
    others: list[str] = []
    searched = 0
    if labelled is not None:
        same, searched = copies(source, labelled)
        leaks = {labelled.describe(there): source.describe(here) for there, here in same.items()}
        others, _, their_pixels, _ = _read(labelled)
        found = first_alike(perceptual_hash(their_pixels), hashes)
        for there, here in enumerate(found.tolist()):
            if here >= 0:
                leaks.setdefault(others[there], names[here])
    return Survey(
        uri=source.uri,
        images=len(source),
        read=len(names),
        unreadable=list(skipped),
        shorter_side=[round(side) for side in np.percentile(shorter, (5, 50, 95))],
        aspect=[round(float(ratio), 2) for ratio in np.percentile(longer / shorter, (5, 50, 95))],
        grayscale=round(float((_colorfulness(pixels) < _GRAY).float().mean()), 3),
        duplicates=[[names[index] for index in group] for group in groups_alike(hashes)],
        smallest_class=None if source.labels is None else int(np.bincount(source.labels).min()),
        labelled=None if labelled is None else len(labelled),
        labelled_read=None if labelled is None else len(others),
        searched=None if labelled is None else searched,
        leaks=[[ours, theirs] for theirs, ours in leaks.items()],
    )


def copies(source: ImageSource, others: ImageSource) -> tuple[dict[int, int], int]:
    """Find which pictures of a folder lie in another one too, byte for byte.

    Returns:
        place in `others` -> place in `source` of each that was found; and how many of `source` were searched: all, but
        where too many have a size that one of the others has; 0 where one of the two is no folder.
    """
    if source.sizes is None or others.sizes is None:
        return {}, 0
    ours = np.flatnonzero(np.isin(source.sizes, others.sizes))
    theirs = np.flatnonzero(np.isin(others.sizes, source.sizes))
    every = -(-int((source.sizes[ours] + _OPENING).sum()) // _MOST_BYTES) or 1
    compared = ours[::every]
    with Progress("looking for copies", total=len(compared) + len(theirs), unit="files") as progress:

        def hashed(where: ImageSource, index: int) -> bytes | None:
            progress.advance()
            try:
                return hashlib.sha256(where.read_bytes(index) or b"").digest()
            except UnreadableImage:
                return None

        # Backwards, so that the first of several stays.
        known = {hashed(source, index): index for index in reversed(compared.tolist())}
        known.pop(None, None)
        found = ((index, known.get(hashed(others, index))) for index in theirs.tolist())
        same = {there: here for there, here in found if here is not None}
    return same, len(source) - len(ours) + len(compared)


def _read(source: ImageSource) -> tuple[list[str], tuple[str, ...], Tensor, NDArray[np.int64]]:
    """Read names of the readable pictures and of the others, (N, 3, 32, 32) uint8, and (N, 2) true sizes."""
    chosen = sample(len(source))
    images = TrainingImages(source.take(chosen), decode_size=_SIDE, max_bad_fraction=1.0)
    rows = np.arange(len(images))
    (batch,) = images.in_order(rows, batch_size=len(rows))
    bad = set(images.skipped)
    names = [name for name in map(source.describe, chosen.tolist()) if name not in bad]
    return names, images.skipped, batch.images, batch.sizes.numpy().astype(np.int64)


def sample(count: int) -> NDArray[np.int64]:
    """Choose which of so many pictures are read: all of few; of many, runs of neighbors, evenly spread."""
    if count <= MOST_READ:
        return np.arange(count, dtype=np.int64)
    starts = np.linspace(0, count - _RUN, MOST_READ // _RUN).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(_RUN))


def perceptual_hash(pixels: Tensor) -> Tensor:
    """Hash pictures so that those that look the same differ in few bits.

    Args:
        pixels: (N, 3, 32, 32) uint8, whole pictures squeezed to squares.

    Returns:
        (N, 120) float32 of ones and minus ones: which of the lowest frequencies of the gray picture, its mean apart,
        are above their median.

    Source: Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1, with 11
    frequencies a side for its 8.
    """
    gray = pixels.float().mean(1)
    place = (torch.arange(_SIDE) + 0.5) * math.pi / _SIDE
    waves = torch.cos(torch.arange(_FREQUENCIES)[:, None] * place)
    spectrum = (waves @ gray @ waves.T).flatten(1)[:, 1:]
    return torch.where(spectrum > spectrum.median(1, keepdim=True).values, 1.0, -1.0)


def alike(hashes: Tensor, others: Tensor) -> Tensor:
    """Return (N, M) whether (N, B) hashes and (M, B) others are near-duplicates."""
    return hashes @ others.T >= hashes.shape[1] - 2 * _SAME_BITS


def first_alike(hashes: Tensor, others: Tensor) -> Tensor:
    """Return (N,) the first of (M, B) others that is a near-duplicate of each of (N, B) hashes, -1 where none is."""
    found = []
    for part in hashes.split(_CHUNK):
        same = alike(part, others)
        found.append(torch.where(same.any(1), same.float().argmax(1), -1))
    return torch.cat(found)


def groups_alike(hashes: Tensor) -> list[list[int]]:
    """Return the groups of near-duplicates among (N, B) hashes: each with the first picture that its others look like."""
    groups: dict[int, list[int]] = {}
    leader: dict[int, int] = {}
    for index, first in enumerate(first_alike(hashes, hashes).tolist()):
        leader[index] = leader.get(first, index)
        groups.setdefault(leader[index], []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def _colorfulness(pixels: Tensor) -> Tensor:
    """Return (N,) the mean difference between the largest and the smallest channel, in 0..255."""
    colors = pixels.float()
    return (colors.amax(1) - colors.amin(1)).mean((1, 2))
