"""A picture small enough to stand on a page, as text."""

from __future__ import annotations

import base64
import io

from PIL import Image


def small_jpeg(image: Image.Image, *, side: int, quality: int) -> str:
    """Return a picture, made no larger than a square of this side in place, as a JPEG in base64, for a page."""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return base64.b64encode(file.getvalue()).decode("ascii")
