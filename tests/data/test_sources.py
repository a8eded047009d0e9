import hashlib
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps
from torchvision import datasets

from edgecl.data.decode import read_picture
from edgecl.data.demo_images import CLASSES, render
from edgecl.data.source import UnreadableImage
from edgecl.data.sources import has_test_split, list_datasets, open_source
from edgecl.errors import DataError


def read_one(path):
    source = open_source(str(path.parent))
    assert len(source) == 1
    return np.asarray(source.read(0))


def save(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.fixture
def gradient():
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    return np.stack(
        [np.tile(ramp, (24, 1)), np.full((24, 32), 90, np.uint8), 255 - np.tile(ramp, (24, 1))], -1
    )


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.webp", "x.PNG"])
def test_lossless_formats_give_the_exact_pixels(tmp_path, gradient, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    np.testing.assert_array_equal(
        read_one(save(tmp_path, Image.fromarray(gradient), name, **options)), gradient
    )


def palette(*colors):
    picture = Image.new("P", (2, 1))
    picture.putpalette([channel for color in colors for channel in color])
    picture.putpixel((1, 0), 1)
    return picture


@pytest.mark.parametrize(
    ("picture", "options", "expected"),
    [
        (Image.new("L", (1, 1), 77), {}, [[77, 77, 77]]),
        (Image.new("1", (1, 1), 1), {}, [[255, 255, 255]]),
        (palette((255, 0, 0), (0, 0, 255)), {}, [[255, 0, 0], [0, 0, 255]]),
        # What is transparent is laid on white.
        (palette((255, 0, 0), (0, 0, 255)), {"transparency": 0}, [[255, 255, 255], [0, 0, 255]]),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 51)), {}, [[255, 204, 204]]),
        (Image.new("LA", (1, 1), (0, 51)), {}, [[204, 204, 204]]),
        (Image.new("RGB", (1, 1), (255, 0, 0)), {"transparency": (255, 0, 0)}, [[255, 255, 255]]),
        # Sixteen bits are scaled, not clipped.
        (Image.fromarray(np.array([[0, 25700]], dtype=np.uint16)), {}, [[0, 0, 0], [100, 100, 100]]),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, picture, options, expected):
    assert read_one(save(tmp_path, picture, "x.png", **options)).tolist() == [expected]


def test_cmyk_becomes_rgb(tmp_path):
    pixels = read_one(save(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "x.jpg", quality=100))
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(tmp_path, gradient, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, Image.fromarray(gradient), "x.png", exif=exif)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(read_one(path), expected)


def test_true_size_counts_after_the_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path, Image.new("RGB", (640, 320)), "x.jpg", exif=exif)
    image, height, width = open_source(str(tmp_path)).read_reduced(0, at_least=64)
    assert (height, width) == (640, 320)
    assert image.height == 2 * image.width


def bad_reason(tmp_path):
    with pytest.raises(UnreadableImage) as caught:
        open_source(str(tmp_path)).read(0)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"), [("", "empty file"), ("not found", "not a JPEG, PNG, WebP or BMP file")]
)
def test_what_is_no_picture_is_unreadable(tmp_path, text, reason):
    (tmp_path / "x.jpg").write_text(text)
    assert bad_reason(tmp_path) == reason


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.bmp", "x.webp"])
def test_a_truncated_file_is_unreadable(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(noise), name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert bad_reason(tmp_path)


@pytest.mark.parametrize("folders", [("dog", "cat"), ("dog/small", "cat/big/old")])
def test_the_first_component_of_class_folders_gives_labels(write_images, folders):
    source = open_source(str(write_images(6, classes=folders)))
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("folders", [("images",), ("dog", "cat", ".")])
def test_a_single_sub_folder_or_an_image_outside_all_means_no_labels(write_images, folders):
    source = open_source(str(write_images(6, classes=folders)))
    assert (source.classes, source.labels) == (None, None)


def test_a_folder_of_splits_is_an_error(write_images):
    root = write_images(4, classes=("train", "test"))
    with pytest.raises(DataError, match="splits test and train") as caught:
        open_source(str(root))
    assert str(root / "train") in caught.value.hint


def test_images_come_sorted_by_name(write_images):
    root = write_images(12, classes=("b", "a/z", "a"))
    source = open_source(str(root))
    names = [source.describe(index) for index in range(len(source))]
    assert names == sorted(str(path) for path in root.rglob("*.png"))


def test_other_files_and_dot_files_are_left_out(write_images):
    root = write_images(3)
    (root / "readme.txt").touch()
    (root / "._000.png").touch()
    (root / ".trash").mkdir()
    (root / ".trash" / "x.png").touch()
    assert len(open_source(str(root))) == 3


def test_a_link_to_a_folder_elsewhere_is_followed(write_images):
    root, other = write_images(2, classes=("a",)), write_images(3, folder="elsewhere")
    (root / "b").symlink_to(other, target_is_directory=True)
    assert open_source(str(root)).labels.tolist() == [0, 0, 1, 1, 1]


def test_fingerprint_is_of_names_and_sizes_wherever_they_lie(write_images):
    one, two = write_images(2), write_images(2, folder="elsewhere")
    seen = [open_source(str(one)).fingerprint]
    assert open_source(str(two)).fingerprint == seen[0]
    (one / "000.png").rename(one / "renamed.png")
    seen.append(open_source(str(one)).fingerprint)
    with (one / "renamed.png").open("ab") as file:
        file.write(b"x")
    seen.append(open_source(str(one)).fingerprint)
    assert len(set(seen)) == 3


@pytest.mark.parametrize(
    ("uri", "problem", "hint"),
    [
        ("empty", "no images in the folder 'empty'", "looked for .jpg"),
        ("no/such/folder", "no folder 'no/such/folder'", "demo, FOLDER, cifar10:PATH"),
        ("x.png", "'x.png' is a file, not a folder", "pass the folder"),
        ("cifar-10:/data", "unknown kind of data 'cifar-10'", "did you mean 'cifar10' or 'cifar100'?"),
        ("https://me:secret@host/x.tar?Sig=hidden", "is a URL", "write shards:https://host/x.tar"),
        ("stl10", "'stl10' needs a place on disk", "write stl10:PATH"),
    ],
)
def test_a_uri_that_names_no_images_says_why_and_keeps_its_secrets(tmp_path, monkeypatch, uri, problem, hint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.png").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        open_source(uri)
    assert problem in caught.value.problem
    assert hint in caught.value.hint
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("uri", [".", "shards:x.tar", "csv:x.csv"])
def test_what_has_no_test_split_says_so(uri):
    assert not has_test_split(uri)
    with pytest.raises(DataError, match="has no test split"):
        open_source(uri, split="test")


@pytest.mark.parametrize("scheme", ["cifar10", "cifar100", "fashion-mnist", "flowers102", "stl10"])
def test_a_set_that_is_not_on_the_disk_asks_for_download(tmp_path, scheme):
    with pytest.raises(DataError) as caught:
        open_source(f"{scheme}:{tmp_path}")
    assert f"{scheme} is not there" in caught.value.problem
    assert "--download" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (OSError("no route to host"), "stl10.*fetched.*no route to host"),
        (ModuleNotFoundError("", name="scipy"), "needs the package 'scipy'"),
    ],
)
def test_what_torchvision_fails_for_is_named(tmp_path, monkeypatch, error, problem):
    def refuse(*_args, **_options):
        raise error

    monkeypatch.setattr("torchvision.datasets.STL10", refuse)
    with pytest.raises(DataError, match=problem):
        open_source(f"stl10:{tmp_path}", download=True)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A CIFAR-10 of four images in torchvision's own layout, held to its own hashes."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    pixels = random.integers(0, 256, (4, 3072), dtype=np.uint8)
    train = write("data_batch_1", {"data": pixels[:3], "labels": [2, 0, 1]})
    test = write("test_batch", {"data": pixels[3:], "labels": [1]})
    meta = write("batches.meta", {"label_names": ["plane", "car", "bird"]})
    monkeypatch.setattr(CIFAR10, "train_list", [train])
    monkeypatch.setattr(CIFAR10, "test_list", [test])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path, pixels


def test_cifar10_gives_torchvisions_images_and_labels(cifar10):
    root, pixels = cifar10
    source = open_source(f"cifar10:{root}")
    assert source.classes == ("plane", "car", "bird")
    assert source.labels.tolist() == [2, 0, 1]
    np.testing.assert_array_equal(np.asarray(source.read(1)), pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar10_test_split_is_held_out(cifar10):
    source = open_source(f"cifar10:{cifar10[0]}", split="test")
    assert len(source) == 1
    assert source.describe(0) == "cifar10 test 0"


def test_a_changed_cifar10_file_is_never_unpickled(cifar10):
    root, _ = cifar10
    batch = root / "cifar-10-batches-py" / "data_batch_1"
    batch.write_bytes(batch.read_bytes() + b"x")
    with pytest.raises(DataError, match="its files are not whole"):
        open_source(f"cifar10:{root}")


@pytest.mark.parametrize(("split", "count"), [("train", 3000), ("test", 1000)])
def test_demo_gives_the_images_of_its_split(split, count):
    source = open_source("demo", split=split)
    pictures, labels = render(split, count, size=32)
    assert (len(source), source.classes) == (count, tuple(CLASSES))
    assert np.array_equal(np.asarray(source.read(7)), pictures[7])
    assert source.labels.tolist() == labels.tolist()


def test_every_form_of_a_uri_is_listed():
    assert [row["name"].partition(":")[0] for row in list_datasets()] == [
        "demo", "FOLDER", "cifar10", "cifar100", "fashion-mnist", "flowers102", "stl10", "shards", "csv",
    ]  # fmt: skip


POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n" + b" " * 512
)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A stand-in for Ghostscript, first on the PATH, and the file it leaves when anything starts it."""
    mark, folder = tmp_path / "ghostscript-was-started", tmp_path / "bin"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\necho started >> '{mark}'\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    # Pillow looks for it once.
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return mark


@pytest.mark.parametrize("name", ["evil.jpg", "evil.png"])
def test_postscript_called_a_picture_starts_no_program(tmp_path, started, name):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / name).write_bytes(POSTSCRIPT)
    source = open_source(str(tmp_path / "evil"))
    with pytest.raises(UnreadableImage, match="not a JPEG, PNG, WebP or BMP"):
        source.read(0)
    with pytest.raises(UnreadableImage, match="not a JPEG, PNG, WebP or BMP"):
        read_picture(source, 0, 32)
    assert not started.exists()


def test_postscript_in_the_place_of_torchvisions_pictures_starts_no_program(tmp_path, started, monkeypatch):
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    (folder / "jpg" / "image_00001.jpg").write_bytes(POSTSCRIPT)
    Image.new("RGB", (8, 8), (9, 8, 7)).save(folder / "jpg" / "image_00002.jpg")
    tables = {"setid.mat": {"trnid": np.array([1, 2])}, "imagelabels.mat": {"labels": np.array([1, 2])}}
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    reader = types.ModuleType("scipy.io")
    reader.loadmat = lambda path, squeeze_me: tables[Path(path).name]
    monkeypatch.setitem(sys.modules, "scipy.io", reader)
    source = open_source(f"flowers102:{tmp_path}")
    with pytest.raises(UnreadableImage, match="not a JPEG, PNG, WebP or BMP"):
        source.read(0)
    assert source.read(1).size == (8, 8)
    assert not started.exists()


@pytest.mark.parametrize("form", ["GIF", "TIFF", "PPM", "ICO", "JPEG2000"])
def test_formats_that_are_not_listed_are_not_decoded(tmp_path, gradient, form):
    with (tmp_path / "picture.png").open("wb") as file:
        Image.fromarray(gradient).save(file, form)
    assert bad_reason(tmp_path) == "not a JPEG, PNG, WebP or BMP file"


@pytest.mark.parametrize("uri", ["x" * 300, "shards:" + "x" * 300, "shards:" + "x" * 300 + "-{0..3}.tar"])
def test_names_too_long_for_the_system_are_named_errors(uri):
    with pytest.raises(DataError, match="cannot be read"):
        open_source(uri)


@pytest.mark.parametrize("uri", ["~nobody-of-that-name/x", "shards:~nobody-of-that-name/x.tar"])
def test_the_home_of_nobody_is_a_named_error(uri):
    with pytest.raises(DataError, match="no home"):
        open_source(uri)
