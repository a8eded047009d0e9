import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_images(tmp_path):
    """Write so many random PNGs into tmp_path/images, in class folders where classes are named."""

    def write(count, *, classes=(), side=8, folder="images"):
        root = tmp_path / folder
        random = np.random.default_rng(0)
        for index in range(count):
            place = root / classes[index % len(classes)] if classes else root
            place.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{index:03}.png")
        return root

    return write
