"""A picture's file -> a net's input, the same on every device and on the host, which prepares its pictures here too.

Pillow decodes and resizes where it is installed; else OpenCV decodes, and without it NumPy decodes binary PPM and PGM alone.
NumPy then resizes as Pillow does, to the same bytes.
"""

import importlib
import io
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple, Union

import numpy as np

from .errors import DataError, DeviceError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Of the files that are looked for in a folder."""
NETPBM = (".ppm", ".pgm")
"""What needs no decoder; looked for on devices too."""

# What the README lists. Pillow knows dozens more, and hands some of them to other programs (PostScript to Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_WRONG_FORMAT = "not a JPEG, PNG, WebP or BMP file"
_ORIENTATION_TAG = 0x0112
# Width, height and the largest sample, with comments between them.
_NETPBM = re.compile(rb"P[56]" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s")
# EXIF's orientation -> the name of the transposition that sets a picture upright.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# What Pillow's weights have for 1.
_WEIGHT_ONE = 1 << 22
# Pillow warns of more.
_MOST_PIXELS = (1 << 30) // 12
_LARGEST_FILE = 1 << 30


class UnreadablePicture(Exception):  # noqa: N818 - a line of a record, not an error
    """A file that is no picture, or a damaged one."""


class Decoded(NamedTuple):
    """A picture that is to be resized, and what decoded it, with its version."""

    picture: Any
    """Pillow's Image, RGB; or (H, W, 3) uint8."""
    decoder: str


# --- files ---


def find_pictures(paths: Sequence[Union[str, Path]]) -> List[Path]:
    """Return the files named, and the pictures of the folders named, at any depth, sorted; dot files are left out.

    Raises:
        DataError: there is no such file or folder, or a folder holds no picture.
    """
    files: List[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(_pictures_in(path))
            if not inside:
                raise DataError(
                    "no pictures in the folder '%s'" % path, "looked for " + ", ".join(EXTENSIONS + NETPBM)
                )
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise DataError("there is no file or folder '%s'" % path)
    return files


def _pictures_in(folder: Path) -> Iterator[Path]:
    seen = set()
    for parent, folders, names in os.walk(str(folder), followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            del folders[:]
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(EXTENSIONS + NETPBM) and not name.startswith("."):
                yield Path(parent) / name


def read_picture(path: Path, *, resize_size: int, image_size: int) -> Tuple[np.ndarray, str]:
    """Decode a file, resize the shorter side, and cut the center out.

    Returns:
        (image_size, image_size, 3) uint8 RGB, and what decoded it.

    Raises:
        UnreadablePicture: it cannot be read, or is no whole picture.
        DeviceError: it is no PPM, and nothing else can be decoded here.
    """
    try:
        if not path.is_file():  # a pipe would block
            raise UnreadablePicture("no file")
        if path.stat().st_size > _LARGEST_FILE:
            raise UnreadablePicture("suspiciously large")
        content = path.read_bytes()
    except OSError as exc:
        raise UnreadablePicture(exc.strerror or str(exc)) from exc
    decoded = decode(content)
    return fit(decoded.picture, resize_size=resize_size, image_size=image_size), decoded.decoder


# --- decoding ---


def decode(content: bytes) -> Decoded:
    """Decode a picture to RGB, the right way up, transparent parts white.

    Raises:
        UnreadablePicture: no picture of a format that edgecl reads, or a damaged one.
        DeviceError: it is no PPM, and nothing else can be decoded here.
    """
    if not content:
        raise UnreadablePicture("empty file")
    try:
        if content[:2] in (b"P5", b"P6"):
            return Decoded(_from_netpbm(content), "NumPy %s" % np.__version__)
        pillow = _import("PIL.Image")
        if pillow is not None:
            return Decoded(_by_pillow(content, pillow), "Pillow %s" % pillow.__version__)
        cv2 = _import("cv2")
        if cv2 is not None:
            return Decoded(_by_opencv(content, cv2), "OpenCV %s" % cv2.__version__)
    except UnreadablePicture:
        raise
    except Exception as exc:  # decoders meet every kind of broken file with every kind of exception
        named = type(exc).__name__
        raise UnreadablePicture(
            _WRONG_FORMAT if named == "UnidentifiedImageError" else str(exc) or named
        ) from exc
    raise DeviceError(
        "nothing here decodes pictures but binary PPM: neither Pillow nor OpenCV can be imported",
        "sudo apt install python3-pil, or pip install pillow; or convert the pictures to PPM",
    )


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def open_with_pillow(content: bytes) -> Any:
    """Open a picture of one of the formats edgecl reads, not decoded yet; no other is tried, whatever the file is called.

    Raises:
        UnidentifiedImageError: it is of none of them; in Pillow before 7, OSError.
    """
    from PIL import Image

    try:
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    except TypeError:  # Pillow before 8 tries every format it knows
        picture = Image.open(io.BytesIO(content))
        if picture.format not in _FORMATS:
            raise UnreadablePicture(_WRONG_FORMAT) from None
        return picture


def exif_turn(picture: Any) -> Any:
    """Return Pillow's transposition that sets a picture upright that was stored turned; None where there is none to do."""
    from PIL import Image

    # A picture with broken EXIF is still a picture; ImageOps.exif_transpose would rewrite the EXIF and fail.
    try:
        exif = picture.getexif() if hasattr(picture, "getexif") else picture._getexif()  # Pillow before 6
        name = _TURNS.get((exif or {}).get(_ORIENTATION_TAG, 1))
    except Exception:
        return None
    return None if name is None else getattr(getattr(Image, "Transpose", Image), name)


def rgb_with_pillow(picture: Any) -> Any:
    """Convert Pillow's picture of any mode to RGB, its transparent parts to white."""
    from PIL import Image

    if picture.mode == "I" or picture.mode.startswith("I;16"):
        # convert() would clip 16 bits to 8 instead of scaling them.
        grayscale = np.asarray(picture).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(np.rint(grayscale).astype(np.uint8)).convert("RGB")
    if _has_transparency(picture):
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _has_transparency(picture: Any) -> bool:
    # Pillow's own property of that name is of version 10.
    palette = picture.palette if picture.mode == "P" else None
    return (
        picture.mode in ("LA", "La", "PA", "RGBA", "RGBa")
        or "transparency" in picture.info
        or (palette is not None and palette.mode.endswith("A"))
    )


def _by_pillow(content: bytes, pillow: Any) -> Any:
    with open_with_pillow(content) as picture:
        _check_size(*picture.size)
        picture.load()
        turn = exif_turn(picture)
        return rgb_with_pillow(picture if turn is None else picture.transpose(turn))


def _by_opencv(content: bytes, cv2: Any) -> np.ndarray:
    coded = np.frombuffer(content, np.uint8)
    whole = cv2.imdecode(coded, cv2.IMREAD_UNCHANGED)
    if whole is None:
        raise UnreadablePicture(_WRONG_FORMAT)
    _check_size(whole.shape[1], whole.shape[0])
    if whole.ndim == 3 and whole.shape[2] == 4:
        scale = np.iinfo(whole.dtype).max
        color, opacity = whole[..., :3].astype(np.float64), whole[..., 3:] / float(scale)
        found = np.rint((color * opacity + scale * (1 - opacity)) * (255.0 / scale)).astype(np.uint8)
    else:
        found = cv2.imdecode(coded, cv2.IMREAD_COLOR)  # 8 bits, and turned by its EXIF flag
    return np.ascontiguousarray(found[..., ::-1])


def _from_netpbm(content: bytes) -> np.ndarray:
    """Decode a binary PPM or PGM of 8 bits."""
    header = _NETPBM.match(content)
    if header is None:
        raise UnreadablePicture("a damaged header")
    width, height, most = map(int, header.groups())
    channels = 3 if content[:2] == b"P6" else 1
    _check_size(width, height)
    if not 0 < most < 256:
        raise UnreadablePicture("samples up to %d, edgecl reads 8 bits" % most)
    size = width * height * channels
    found = np.frombuffer(content[header.end() : header.end() + size], np.uint8)
    if len(found) < size or not size:
        raise UnreadablePicture("cut off")
    found = found.reshape(height, width, channels)
    if most < 255:
        found = np.rint(found.astype(np.float64) * 255 / most).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.repeat(found, 3 // channels, axis=2))


def _check_size(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise UnreadablePicture("%d x %d pixels is suspiciously large" % (width, height))


# --- resizing ---


class Fit(NamedTuple):
    """How a picture becomes a net's square: the size to resize it to, and where the square then begins."""

    width: int
    height: int
    left: int
    top: int


def fitting(width: int, height: int, *, resize_size: int, image_size: int) -> Fit:
    """Return how the shorter side becomes resize_size, and the square of image_size stands in the middle.

    Source: torchvision's Resize and CenterCrop.
    """
    if width <= height:
        width, height = resize_size, resize_size * height // width
    else:
        width, height = resize_size * width // height, resize_size
    return Fit(width, height, round((width - image_size) / 2), round((height - image_size) / 2))


def fit(picture: Any, *, resize_size: int, image_size: int) -> np.ndarray:
    """Resize the shorter side, antialiased bilinear, and cut the center out.

    Args:
        picture: Pillow's Image, RGB; or (H, W, 3) uint8.
        resize_size: pixels, >= image_size; small pictures are enlarged.
        image_size: side of the square, pixels.

    Returns:
        (image_size, image_size, 3) uint8, of both kinds of picture the same (see `resize`).
    """
    in_numpy = isinstance(picture, np.ndarray)
    width, height = (picture.shape[1], picture.shape[0]) if in_numpy else picture.size
    to = fitting(width, height, resize_size=resize_size, image_size=image_size)
    right, bottom = to.left + image_size, to.top + image_size
    if in_numpy:
        return resize(picture, to.width, to.height)[to.top : bottom, to.left : right]
    if (width, height) != (to.width, to.height):
        from PIL import Image

        picture = picture.resize((to.width, to.height), getattr(Image, "Resampling", Image).BILINEAR)
    return np.array(picture.crop((to.left, to.top, right, bottom)))


def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize as Pillow does with BILINEAR, to the same bytes.

    Pillow 13 takes very tall pictures the other way round, height first, and differs by 1 in some of their bytes.

    Args:
        pixels: (H, W, C) uint8.
        width: new one, pixels.
        height: new one, pixels.

    Source: Pillow's src/libImaging/Resample.c: first within rows, rounded, then across them; weights have 22 bits behind
        the point.
    """
    if pixels.shape[1] != width:
        pixels = _resize_first(np.ascontiguousarray(pixels.transpose(1, 0, 2)), width).transpose(1, 0, 2)
    return pixels if pixels.shape[0] == height else _resize_first(np.ascontiguousarray(pixels), height)


def _resize_first(pixels: np.ndarray, new: int) -> np.ndarray:
    """Resize the first of three axes."""
    old = len(pixels)
    scale = old / new
    reach = max(scale, 1.0)
    resized = np.empty((new,) + pixels.shape[1:], np.uint8)
    for place in range(new):
        center = (place + 0.5) * scale
        first, last = max(int(center - reach + 0.5), 0), min(int(center + reach + 0.5), old)
        near = (1 - np.abs(np.arange(first, last) - center + 0.5) / reach).clip(0)
        weights = np.floor(near / near.sum() * _WEIGHT_ONE + 0.5)
        # Whole numbers below 2 ** 53: exact in any order.
        sums = weights.dot(pixels[first:last].reshape(last - first, -1).astype(np.float64))
        resized[place] = np.floor(sums / _WEIGHT_ONE + 0.5).clip(0, 255).reshape(pixels.shape[1:])
    return resized


# --- the net's input ---


def as_input(pictures: np.ndarray, form: Dict[str, Any], preprocessing: Dict[str, Any]) -> np.ndarray:
    """Return pictures (N, S, S, 3) uint8 as a net takes them: bytes in either layout, or normalized, channels first."""
    if form.get("layout") != "nhwc":
        pictures = pictures.transpose(0, 3, 1, 2)
    if form.get("dtype") != "uint8":
        mean, std = (np.array(preprocessing[name], np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
        pictures = (pictures.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(pictures)
