import numpy as np
import pytest
from PIL import Image

from edgecl.data import fetching

from .tar_shards import picture


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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of shards and of their indices that this test alone has."""
    monkeypatch.setenv("EDGECL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    return tmp_path / "cache" / "shards"


@pytest.fixture
def write_shards(tmp_path):
    """Write shards with WebDataset's own writer: pictures numbered through, a class each unless told otherwise."""
    from webdataset import TarWriter

    def write(count, *, each=4, classes=3, folder="data"):
        root = tmp_path / folder
        root.mkdir(parents=True, exist_ok=True)
        for shard in range(count):
            with TarWriter(str(root / f"x-{shard:03}.tar")) as writer:
                for number in range(shard * each, (shard + 1) * each):
                    sample = {"__key__": f"{number:06}", "png": picture(number), "json": {"number": number}}
                    writer.write(sample | ({"cls": number % classes} if classes else {}))
        return root

    return write
