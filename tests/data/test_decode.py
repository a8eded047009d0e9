"""Plain JPEGs go past Pillow; what comes out must be what Pillow would have made of them."""

import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from edgecl.data import decode
from edgecl.data.decode import decode_on, read_encoded, read_picture, refuse_without_nvjpeg, squeeze
from edgecl.data.loading import TrainingImages
from edgecl.data.source import UnreadableImage
from edgecl.data.sources import open_source
from edgecl.errors import DeviceError


def scene(height, width, channels=3):
    """Smooth colors, a sharp disc off the center, and a little noise."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    smooth = np.stack([y, x, 1 - y * x], -1) * 200 + 20
    smooth[(y - 0.2) ** 2 + (x - 0.3) ** 2 < 0.02] = (250, 30, 90)
    noisy = smooth + np.random.default_rng(0).normal(0, 3, smooth.shape)
    pixels = noisy.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


def save(tmp_path, image, name="x.jpg", **options):
    image.save(tmp_path / name, **{"quality": 92, **options})
    return open_source(str(tmp_path))


def by_pillow(source, side):
    image, height, width = source.read_reduced(0, at_least=2 * side)
    return squeeze(image, side), height, width


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def is_plain(source, side=32):
    return isinstance(read_encoded(source, 0, side), decode.PlainJpeg)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2}, {"keep_rgb": True}],
    ids=str,
)
def test_a_plain_jpeg_is_pillows_picture(tmp_path, options):
    source = save(tmp_path, scene(60, 90), **options)
    assert is_plain(source)
    ours, height, width = read_picture(source, 0, 64)
    theirs = by_pillow(source, 64)
    assert (height, width) == theirs[1:] == (60, 90)
    # The two antialiased resizings round differently.
    assert (ours.int() - theirs[0].int()).abs().max() <= 1


def test_a_jpeg_of_the_canvas_size_is_pillows_bit_for_bit(tmp_path):
    source = save(tmp_path, scene(64, 64))
    assert is_plain(source)
    assert torch.equal(read_picture(source, 0, 64).pixels, by_pillow(source, 64)[0])


def test_a_grayscale_jpeg_has_three_equal_channels(tmp_path):
    source = save(tmp_path, scene(50, 70, channels=1))
    assert is_plain(source)
    ours = read_picture(source, 0, 40).pixels
    assert torch.equal(ours[0], ours[1])
    assert torch.equal(ours[0], ours[2])
    assert (ours.int() - by_pillow(source, 40)[0].int()).abs().max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_a_plain_jpeg_upright(tmp_path, orientation):
    source = save(tmp_path, scene(60, 90), exif=turned(orientation))
    assert is_plain(source)
    ours, height, width = read_picture(source, 0, 64)
    theirs = by_pillow(source, 64)
    assert (height, width) == theirs[1:]
    assert (ours.int() - theirs[0].int()).abs().max() <= 2


def test_an_orientation_in_xmp_counts_as_with_pillow(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    source = save(tmp_path, scene(60, 90), xmp=xmp)
    assert read_picture(source, 0, 32)[1:] == by_pillow(source, 32)[1:] == (90, 60)


def test_broken_exif_does_not_cost_a_jpeg(tmp_path):
    source = save(tmp_path, scene(60, 90), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert read_picture(source, 0, 32)[1:] == (60, 90)


@pytest.mark.parametrize(("height", "width"), [(1200, 1600), (900, 450), (2048, 300)])
def test_a_large_jpeg_is_decoded_at_a_reduced_scale_and_stays_the_picture(
    tmp_path, height, width, monkeypatch
):
    scales = []
    real = simplejpeg.decode_jpeg

    def record(*args, **options):
        pixels = real(*args, **options)
        scales.append(pixels.shape[0] / height)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", record)
    source = save(tmp_path, scene(height, width))
    ours = read_picture(source, 0, 64).pixels
    assert 2 * 64 <= scales[0] * min(height, width) <= 2 * 64 + min(height, width) / 8
    whole = squeeze(source.read(0), 64)
    assert (ours.int() - whole.int()).abs().float().mean() < 1.5


@pytest.mark.parametrize("mode", ["CMYK", "png", "webp"])
def test_what_is_no_plain_jpeg_goes_to_pillow(tmp_path, mode):
    picture = scene(40, 60)
    content = io.BytesIO()
    if mode == "CMYK":
        picture.convert("CMYK").save(content, format="JPEG")
    else:
        picture.save(content, format=mode)
    (tmp_path / "x.jpg").write_bytes(content.getvalue())
    source = open_source(str(tmp_path))
    assert not is_plain(source)
    assert torch.equal(read_picture(source, 0, 32).pixels, by_pillow(source, 32)[0])


def test_a_jpeg_with_a_warning_is_what_pillow_makes_of_it(tmp_path):
    source = save(tmp_path, scene(60, 90))
    path = tmp_path / "x.jpg"
    content = path.read_bytes()
    place = content.rindex(b"\xff\xda") + 40
    # A marker that does not belong there: libjpeg says so and goes on.
    path.write_bytes(content[:place] + b"\xff\xd3" + content[place:])
    source = open_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"."):
        simplejpeg.decode_jpeg(path.read_bytes())
    assert torch.equal(read_picture(source, 0, 32).pixels, by_pillow(source, 32)[0])


def test_a_truncated_jpeg_is_unreadable_and_the_file_is_at_fault(tmp_path):
    source = save(tmp_path, scene(60, 90))
    path = tmp_path / "x.jpg"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UnreadableImage) as caught:
        read_picture(source, 0, 32)
    assert "truncated" in str(caught.value)
    assert caught.value.lasting


def test_a_file_that_is_gone_is_not_remembered_as_damaged(tmp_path):
    source = save(tmp_path, scene(60, 90))
    (tmp_path / "x.jpg").unlink()
    with pytest.raises(UnreadableImage, match="the file is gone") as caught:
        read_picture(source, 0, 32)
    assert not caught.value.lasting


def test_a_jpeg_too_large_to_be_honest_is_unreadable(tmp_path, monkeypatch):
    source = save(tmp_path, scene(60, 90))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(UnreadableImage, match=r"suspiciously large|decompression bomb"):
        read_picture(source, 0, 32)


# --- decoded where it is wanted: on the processor here, by the code that a GPU runs ---


def test_decoding_on_a_device_gives_the_canvases_of_the_processor(tmp_path):
    for number, (height, width) in enumerate([(60, 90), (200, 100), (32, 32)]):
        scene(height, width).save(tmp_path / f"{number}.jpg", exif=turned(1 + 5 * (number == 1)))
    source = open_source(str(tmp_path))
    jpegs = [read_encoded(source, index, 32) for index in range(3)]
    images = decode_on(torch.device("cpu"), jpegs, 32)
    assert images.shape == (3, 3, 32, 32)
    for index, square in enumerate(images):
        expected = read_picture(source, index, 32)
        assert (square.int() - expected.pixels.int()).abs().float().mean() < 1.0
        assert (jpegs[index].height, jpegs[index].width) == expected[1:]


def streamed(root, monkeypatch, **options):
    """Batches decoded by a GPU's code, on the processor."""
    monkeypatch.setattr("edgecl.data.loading.refuse_without_nvjpeg", lambda device: None)
    data = TrainingImages(open_source(str(root)), decode_size=16, cache_mib=0, decode="cuda", **options)
    return data, list(data.to("cpu").batches(0, 0, batch_size=len(data)))


def mixed_folder(tmp_path):
    for number in range(6):
        picture = Image.fromarray(np.full((20 + number, 30, 3), 40 * number, dtype=np.uint8))
        picture.save(tmp_path / (f"{number}.jpg" if number % 2 else f"{number}.png"), quality=95)


def test_a_batch_of_jpegs_and_others_comes_in_its_order(tmp_path, monkeypatch):
    mixed_folder(tmp_path)
    _, (batch,) = streamed(tmp_path, monkeypatch)
    for index, square, size in zip(batch.indices.tolist(), batch.images, batch.sizes.tolist(), strict=True):
        assert (square.float().mean() - 40 * index).abs() < 2
        assert size == [20 + index, 30]


def test_a_damaged_jpeg_in_a_batch_for_the_device_is_replaced_by_the_next(tmp_path, monkeypatch):
    mixed_folder(tmp_path)
    path = tmp_path / "3.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    data, (batch,) = streamed(tmp_path, monkeypatch, max_bad_fraction=0.5)
    assert sorted(batch.indices.tolist()) == [0, 1, 2, 4, 4, 5]
    assert data.skipped == (str(path),)
    for index, square in zip(batch.indices.tolist(), batch.images, strict=True):
        assert (square.float().mean() - 40 * index).abs() < 2


def test_decoding_on_a_gpu_is_refused_without_one(write_images):
    data = TrainingImages(open_source(str(write_images(3))), decode_size=8, decode="cuda")
    with pytest.raises(DeviceError) as caught:
        data.to("cpu")
    assert "decode is 'cuda', but the run is on 'cpu'" in caught.value.problem


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_a_torchvision_that_cannot_decode_on_the_gpu_is_named():
    with pytest.raises(DeviceError) as caught:
        refuse_without_nvjpeg(torch.device("cuda"))
    assert caught.value.problem.startswith("torchvision cannot decode JPEGs on 'cuda': ")
    assert "CUDA build of torchvision" in caught.value.hint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_decodes_nearly_the_canvases_of_the_processor(tmp_path):
    scene(375, 500).save(tmp_path / "0.jpg")
    source = open_source(str(tmp_path))
    on_gpu = decode_on(torch.device("cuda"), [read_encoded(source, 0, 64)], 64)
    assert (on_gpu[0].cpu().int() - read_picture(source, 0, 64).pixels.int()).abs().float().mean() < 2
