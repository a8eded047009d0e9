"""Tar shards of pictures that tell their numbers, and what is read out of them."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from edgecl.data.sources import open_source
from edgecl.errors import DataError


def picture(number, *, side=8):
    """A picture whose every pixel tells its number."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 7)).save(stream, "PNG")
    return stream.getvalue()


def number_of(image):
    red, green, _ = np.asarray(image)[0, 0].tolist()
    return red + 256 * green


def pattern(root, last):
    return f"shards:{root}/x-{{000..{last:03}}}.tar"


def write_tar(path, members):
    """Write a tar of (name or TarInfo, content) with the standard library."""
    with tarfile.open(path, "w") as archive:
        for member, content in members:
            member = tarfile.TarInfo(member) if isinstance(member, str) else member
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content))
    return path


def numbers(source):
    return [number_of(source.read(index)) for index in range(len(source))]


def exc(uri):
    with pytest.raises(DataError) as caught:
        open_source(uri)
    return caught.value
