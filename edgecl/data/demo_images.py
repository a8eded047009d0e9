"""The images behind `edgecl demo`: ten kinds of machine part on a tray, drawn by NumPy.

Sorting and inspecting parts is a typical job for a small vision net. The class decides only the *outline*: place,
size, rotation, proportions, colors, contrast, lighting and noise come from the same distributions for every class.
(A part still covers more or less of the tray: mean color alone classifies 15.8 % against 10 % by chance.)

Image i of a split depends only on (split, i): asking for more never changes those already drawn, and the splits use
disjoint random streams. `validation` is for choosing a recipe; the demo itself uses `train` and `test` only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgecl.data.source import ImageSource, Split, sha256_of

Field = NDArray[np.floating[Any]]
# (x, y, shape) -> signed distance to the part's outline, negative inside.  The
# part fills about -1..1; ``shape`` in 0..1 varies its proportions.
Outline = Callable[[Field, Field, float], Field]

SUMMARIES = {"demo": "images drawn by edgecl itself; nothing to download"}
SPLITS = ("train", "validation", "test")

# What `demo` means as a data URI: images to learn from, images held out, and their side in pixels.
TRAIN_IMAGES = 3000
TEST_IMAGES = 1000
SIZE = 32

_STREAM = 20_260_101  # first word of every seed: keeps these streams the demo's own


# Outlines; y points down, as in the picture.


def _box(x: Field, y: Field, half_width: float, half_height: float) -> Field:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _polygon(x: Field, y: Field, corners: int) -> Field:
    """Regular polygon, one corner up; its corners lie on the unit circle."""
    sector = 2.0 * np.pi / corners
    angle = np.arctan2(x, -y)
    angle = (angle + 0.5 * sector) % sector - 0.5 * sector  # 0 at each corner
    distance: Field = np.hypot(x, y) * np.cos(0.5 * sector - np.abs(angle)) - np.cos(0.5 * sector)
    return distance


def _disc(x: Field, y: Field, shape: float) -> Field:
    return np.hypot(x, y) - 0.9


def _washer(x: Field, y: Field, shape: float) -> Field:
    radius = np.hypot(x, y)
    return np.maximum(radius - 0.9, 0.4 + 0.2 * shape - radius)


def _nut(x: Field, y: Field, shape: float) -> Field:
    return np.maximum(_polygon(x, y, 6), 0.3 + 0.15 * shape - np.hypot(x, y))


def _gear(x: Field, y: Field, shape: float) -> Field:
    teeth = np.sin(8.0 * np.arctan2(y, x))
    return np.hypot(x, y) - 0.78 - (0.14 + 0.06 * shape) * np.clip(2.0 * teeth, -1.0, 1.0)


def _plate(x: Field, y: Field, shape: float) -> Field:
    return _box(x, y, 0.8, 0.62 + 0.18 * shape)


def _wedge(x: Field, y: Field, shape: float) -> Field:
    return _polygon(x, y - 0.2, 3) + 0.05 * shape


def _cross(x: Field, y: Field, shape: float) -> Field:
    arm = 0.22 + 0.12 * shape
    return np.minimum(_box(x, y, 0.95, arm), _box(x, y, arm, 0.95))


def _bracket(x: Field, y: Field, shape: float) -> Field:
    """An L: one upright, one foot."""
    arm = 0.2 + 0.1 * shape
    upright = _box(x + 0.85 - arm, y, arm, 0.85)
    return np.minimum(upright, _box(x, y - 0.85 + arm, 0.85, arm))


def _tee(x: Field, y: Field, shape: float) -> Field:
    arm = 0.2 + 0.1 * shape
    return np.minimum(_box(x, y, arm, 0.85), _box(x, y + 0.85 - arm, 0.85, arm))


def _clip(x: Field, y: Field, shape: float) -> Field:
    """A retaining ring: a washer with a gap on the right."""
    gap = np.maximum(np.abs(y) - 0.3 - 0.1 * shape, -x)
    return np.maximum(_washer(x, y, 0.5), -gap)


_OUTLINES: dict[str, Outline] = {
    "disc": _disc,
    "washer": _washer,
    "nut": _nut,
    "gear": _gear,
    "plate": _plate,
    "wedge": _wedge,
    "cross": _cross,
    "bracket": _bracket,
    "tee": _tee,
    "clip": _clip,
}

CLASSES: tuple[str, ...] = tuple(_OUTLINES)


# From outline to picture.


def _light(grid: Field, rng: np.random.Generator) -> Field:
    """A lamp on a random side: brightness falls off across the picture."""
    angle, strength = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.0, 0.15)
    light: Field = 1.0 + strength * (np.cos(angle) * grid[:, None] + np.sin(angle) * grid[None, :])
    return light


def _draw(outline: Outline, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One picture: place the part, then color and light it the same way for every class."""
    grid = ((np.arange(size) + 0.5) / size * 2.0 - 1.0).astype(np.float32)
    angle, scale = rng.uniform(-0.4, 0.4), rng.uniform(0.55, 0.8)
    stretch = rng.uniform(0.88, 1.14)
    shift = rng.uniform(-0.15, 0.15, 2)
    x, y = np.meshgrid(grid - shift[0], grid - shift[1])
    u = (np.cos(angle) * x - np.sin(angle) * y) / (scale * stretch)
    v = (np.sin(angle) * x + np.cos(angle) * y) / (scale / stretch)
    distance = outline(u, v, rng.random()) * scale * size / 2.0  # in pixels
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]  # one pixel of anti-aliasing
    bevel = np.clip(1.0 + distance / (0.06 * size), 0.0, 1.0)[..., None]  # 1 at the rim
    tray = rng.uniform(0.18, 0.28) * rng.uniform(0.85, 1.15, 3)
    metal = rng.uniform(0.65, 0.80) * rng.uniform(0.85, 1.15, 3)
    picture = tray + cover * (metal * (1.0 - 0.25 * bevel) - tray)
    picture = picture * _light(grid, rng)[..., None]
    picture += rng.uniform(0.01, 0.02) * rng.standard_normal((size, size, 1), dtype=np.float32)
    pixels: NDArray[np.uint8] = (np.clip(picture, 0.0, 1.0) * 255.0).astype(np.uint8)
    return pixels


def render(split: str, count: int, *, size: int = 32) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw the first images of a split.

    Args:
        split: one of SPLITS.
        size: height and width, pixels.

    Returns:
        (N, size, size, 3) uint8 images, and (N,) int64 labels, balanced at any count.
    """
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)  # balanced at any count
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    outlines = tuple(_OUTLINES.values())
    for index, label in enumerate(labels):
        rng = np.random.default_rng([_STREAM, SPLITS.index(split), index])
        images[index] = _draw(outlines[label], size, rng)
    return images, labels


# Once per process, however often they are opened.
_drawn = cache(render)


def open_demo(split: Split) -> ImageSource:
    """Open the demo's pictures."""
    count = TRAIN_IMAGES if split == "train" else TEST_IMAGES
    pictures, labels = _drawn(split, count, size=SIZE)
    return ImageSource(
        uri="demo",
        fingerprint=sha256_of(f"demo {split} {count} of {SIZE} px"),
        length=count,
        opener=lambda index: Image.fromarray(pictures[index]),
        namer=lambda index: f"demo {split} {index}",
        classes=tuple(CLASSES),
        labels=labels,
    )
