"""Pictures become the same inputs whatever decodes and resizes them."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image

from edgecl.data.loading import normalize
from edgecl.onboard import pictures
from edgecl.onboard.errors import DataError, DeviceError
from edgecl.onboard.pictures import UnreadablePicture, as_input, decode, find_pictures, fit, read_picture

RANDOM = np.random.default_rng(0)


def noise(height, width, channels=3):
    return RANDOM.integers(0, 256, (height, width, channels), dtype=np.uint8)


def written(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("height", "width", "resize_size", "image_size"),
    [
        (300, 400, 72, 64),
        (61, 90, 64, 64),
        (7, 5, 32, 28),
        (64, 64, 64, 56),
        (1, 1, 8, 8),
        (900, 600, 300, 224),
    ],
)
def test_numpy_resizes_as_pillow_does_to_the_byte(height, width, resize_size, image_size):
    pixels = noise(height, width)
    size = {"resize_size": resize_size, "image_size": image_size}
    assert np.array_equal(fit(pixels, **size), fit(Image.fromarray(pixels), **size))


def test_very_tall_pictures_differ_by_one_at_most():
    pixels = noise(400, 50)
    size = {"resize_size": 32, "image_size": 32}
    found, expected = fit(pixels, **size).astype(int), fit(Image.fromarray(pixels), **size)
    assert np.abs(found - expected).max() <= 1  # Pillow 13 resizes these the other way round


@pytest.mark.parametrize("comment", [b"", b"# by hand\n", b"\n  # two\n# lines\n"])
def test_ppm_is_decoded_by_numpy_alone(comment, monkeypatch):
    monkeypatch.setattr(pictures, "_import", lambda name: None)
    pixels = noise(3, 5)
    found = decode(b"P6\n" + comment + b"5 3\n255\n" + pixels.tobytes())
    assert np.array_equal(found.picture, pixels)
    assert found.decoder == f"NumPy {np.__version__}"
    gray = decode(b"P5 2 1 100\n" + bytes([50, 100])).picture
    assert gray.tolist() == [[[128] * 3, [255] * 3]]


@pytest.mark.parametrize(
    "content", [b"", b"P6", b"P6 x 1 255\n", b"P5 #", b"P6 2 1 255\n12345", b"P6 2 1 65535\n" + bytes(12)]
)
def test_damaged_ppm_is_unreadable(content):
    with pytest.raises(UnreadablePicture):
        decode(content)


def test_without_a_decoder_the_device_says_what_to_install(monkeypatch):
    monkeypatch.setattr(pictures, "_import", lambda name: None)
    with pytest.raises(DeviceError, match="Pillow") as caught:
        decode(written(Image.fromarray(noise(4, 4)), "PNG"))
    assert "python3-pil" in str(caught.value.hint)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P"])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_opencv_decodes_what_pillow_does(mode, form, monkeypatch):
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-python-headless")
    if form == "JPEG" and mode not in ("RGB", "L"):
        pytest.skip("no such JPEG")
    picture = Image.fromarray(noise(20, 30, 4), "RGBA").convert(mode)
    exif = Image.Exif()
    exif[0x112] = 6 if form == "JPEG" else 1
    content = written(picture, form, exif=exif)
    expected = np.asarray(decode(content).picture)
    real = pictures._import
    monkeypatch.setattr(pictures, "_import", lambda name: None if name.startswith("PIL") else real(name))
    found = decode(content)
    assert found.decoder.startswith("OpenCV")
    assert np.abs(found.picture.astype(int) - expected).max() <= 1


def test_old_pillow_without_a_list_of_formats_still_takes_no_other(monkeypatch):
    real = PIL.Image.open

    def old_open(file, mode="r"):
        return real(file, mode)

    monkeypatch.setattr(PIL.Image, "open", old_open)
    assert decode(written(Image.fromarray(noise(4, 6)), "PNG")).picture.size == (6, 4)
    with pytest.raises(UnreadablePicture, match="not a JPEG"):
        decode(written(Image.fromarray(noise(4, 6)), "GIF"))


def test_folders_are_searched_and_what_is_missing_is_named(tmp_path):
    for name in ("b/two.PNG", "a/one.jpg", "a/.hidden.jpg", ".dot/three.jpg", "four.txt", "five.ppm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = find_pictures([tmp_path / "four.txt", tmp_path])
    assert [file.relative_to(tmp_path).as_posix() for file in found] == [
        "four.txt",  # named, so wanted
        "a/one.jpg",
        "b/two.PNG",
        "five.ppm",
    ]
    with pytest.raises(DataError, match=r"nowhere\.jpg"):
        find_pictures([tmp_path / "nowhere.jpg"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        find_pictures([tmp_path / "empty"])
    with pytest.raises(UnreadablePicture, match="no file"):
        read_picture(tmp_path, resize_size=8, image_size=8)


def test_inputs_are_those_of_torch_to_the_bit_or_the_bytes_themselves():
    squares, about = (
        noise(24, 8).reshape(3, 8, 8, 3),
        {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    )
    expected = normalize(torch.from_numpy(squares.transpose(0, 3, 1, 2)), about["mean"], about["std"])
    found = as_input(squares, {}, about)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected.numpy())
    assert np.array_equal(as_input(squares, {"dtype": "uint8", "layout": "nhwc"}, about), squares)
    channels_first = as_input(squares, {"dtype": "uint8", "layout": "nchw"}, about)
    assert channels_first.flags.c_contiguous
    assert np.array_equal(channels_first, squares.transpose(0, 3, 1, 2))
