"""A picture's bytes -> a square of pixels: plain JPEGs by libjpeg-turbo or nvJPEG, everything else by Pillow.

A JPEG is plain when libjpeg-turbo decodes it to what Pillow would: 8 bits, grayscale or color, no warning. Anything else
(CMYK, a damaged file, a PNG with a JPEG's name) goes to Pillow, whose word is the last one on what is readable.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edgecl.data.source import SIDES_SWAP, ImageSource
from edgecl.errors import DeviceError, first_line
from edgecl.onboard.pictures import exif_turn, open_with_pillow

_PLAIN_COLORS = ("YCbCr", "Gray", "RGB")
JPEG = b"\xff\xd8\xff"
"""How every JPEG file begins."""
# EXIF and XMP, where a camera says how it was held. The bytes may also stand elsewhere by chance: then Pillow looks
# at the header for nothing.
_APP1 = b"\xff\xe1"

_T = Image.Transpose
_TURNED = {
    _T.FLIP_LEFT_RIGHT: (lambda pixels: pixels.flip(2)),
    _T.ROTATE_180: (lambda pixels: pixels.flip(1, 2)),
    _T.FLIP_TOP_BOTTOM: (lambda pixels: pixels.flip(1)),
    _T.TRANSPOSE: (lambda pixels: pixels.mT),
    _T.ROTATE_270: (lambda pixels: pixels.mT.flip(2)),
    _T.TRANSVERSE: (lambda pixels: pixels.mT.flip(1, 2)),
    _T.ROTATE_90: (lambda pixels: pixels.mT.flip(1)),
}


class Picture(NamedTuple):
    """A whole picture, squeezed to a square."""

    pixels: Tensor
    """(3, S, S) uint8."""
    height: int
    """True height the right way up, pixels."""
    width: int


class PlainJpeg(NamedTuple):
    """A plain JPEG, not decoded yet."""

    content: bytes
    height: int
    """True height the right way up, pixels."""
    width: int
    turn: Image.Transpose | None
    """What sets it upright."""


def read_picture(source: ImageSource, index: int, side: int) -> Picture:
    """Read one picture of a source, whole, as a square.

    JPEGs are decoded at a reduced scale of at least twice the side, as in Pillow's thumbnail(): JPEG's own scaling is
    coarse.

    Raises:
        UnreadableImage: as in `ImageSource.read`.
    """
    found = read_encoded(source, index, side)
    if isinstance(found, Picture):
        return found
    return decode_plain(found, side) or _by_pillow(source, index, side, found.content)


def read_encoded(source: ImageSource, index: int, side: int) -> PlainJpeg | Picture:
    """Read one picture of a source but leave a plain JPEG as it is, for `decode_plain` or `decode_on`.

    Raises:
        UnreadableImage: as in `ImageSource.read`.
    """
    content = source.read_bytes(index)
    if content is not None and (plain := _plain(content)):
        return plain
    return _by_pillow(source, index, side, content)


def decode_plain(jpeg: PlainJpeg, side: int) -> Picture | None:
    """Decode a plain JPEG on the processor; None where libjpeg-turbo has doubts about it."""
    try:
        pixels = simplejpeg.decode_jpeg(jpeg.content, min_height=2 * side, min_width=2 * side, min_factor=2)
    except Exception:
        return None
    image = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    if image.shape[-2:] != (side, side):
        image = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
    return Picture(_upright(image[0], jpeg.turn), jpeg.height, jpeg.width)


def decode_on(device: torch.device, jpegs: Sequence[PlainJpeg], side: int) -> Tensor | None:
    """Decode plain JPEGs where they are wanted, on a GPU with nvJPEG, and resize them there.

    Returns:
        (N, 3, side, side) uint8 on the device; None where the decoder refused one of them.
    """
    try:
        pictures = _by_torchvision([jpeg.content for jpeg in jpegs], device)
    except RuntimeError:
        return None
    squares = torch.empty((len(jpegs), 3, side, side), dtype=torch.uint8, device=device)
    for place, picture, jpeg in zip(squares, pictures, jpegs, strict=True):
        # CUDA resizes no whole numbers.
        square = F.interpolate(
            picture.unsqueeze(0).float(), (side, side), mode="bilinear", antialias=True
        ).round_()
        place.copy_(_upright(square[0].clamp_(0, 255), jpeg.turn))
    return squares


def refuse_without_nvjpeg(device: torch.device) -> None:
    """Make sure that JPEGs can be decoded on a device.

    Raises:
        DeviceError: it is no GPU, or torchvision has no decoder for it.
    """
    if device.type != "cuda":
        raise DeviceError(
            f"[data] decode is 'cuda', but the run is on '{device.type}'",
            hint="set data.decode to 'cpu', or run on an NVIDIA GPU, with CUDA builds of torch and torchvision",
        )
    try:
        _by_torchvision([simplejpeg.encode_jpeg(np.zeros((16, 16, 3), dtype=np.uint8))], device)
    except (RuntimeError, ImportError) as exc:
        reason = first_line(exc) or type(exc).__name__
        raise DeviceError(
            f"torchvision cannot decode JPEGs on '{device}': {reason}",
            hint="set data.decode to 'cpu', or install a CUDA build of torchvision, which brings nvJPEG",
        ) from exc


def squeeze(image: Image.Image, side: int) -> Tensor:
    """Squeeze a whole picture to a square, antialiased bilinear; one of that size already stays as it is.

    Returns:
        (3, side, side) uint8.
    """
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return as_tensor(image)


def as_tensor(image: Image.Image | NDArray[np.uint8]) -> Tensor:
    """Return an RGB picture's pixels, (3, H, W) uint8."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def _by_torchvision(contents: Sequence[bytes], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        # From 0.29 on torchvision calls its decoders deprecated in favor of a package of their own.
        warnings.simplefilter("ignore", DeprecationWarning)
        pictures: list[Tensor] = decode_jpeg(
            [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents],
            mode=ImageReadMode.RGB,
            device=device,
        )
    return pictures


def _plain(content: bytes) -> PlainJpeg | None:
    if not content.startswith(JPEG):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
    except Exception:
        return None
    if colors not in _PLAIN_COLORS:
        return None
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        return None
    turn = None
    if _APP1 in content:
        with contextlib.suppress(Exception), open_with_pillow(content) as image:
            turn = exif_turn(image)
    if turn in SIDES_SWAP:
        height, width = width, height
    return PlainJpeg(content, height, width, turn)


def _by_pillow(source: ImageSource, index: int, side: int, content: bytes | None) -> Picture:
    image, height, width = source.read_reduced(index, at_least=2 * side, content=content)
    return Picture(squeeze(image, side), height, width)


def _upright(pixels: Tensor, turn: Image.Transpose | None) -> Tensor:
    # A square turns after it was resized: less to move, and the resizing is the same in both directions.
    return pixels if turn is None else _TURNED[turn](pixels)
