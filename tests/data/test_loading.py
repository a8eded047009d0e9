import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from edgecl.data.decode import squeeze
from edgecl.data.loading import (
    TrainingImages,
    choose_images,
    eval_image,
    load_eval_images,
    normalize,
    split_holdout,
)
from edgecl.data.randomness import permutation
from edgecl.data.source import UnreadableImage
from edgecl.data.sources import open_source
from edgecl.errors import DataError


def noise(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def training(root, **options):
    return TrainingImages(open_source(str(root)), **{"decode_size": 8, **options})


def rows(batches):
    return [(b.indices.tolist(), b.images.tolist(), b.sizes.tolist()) for b in batches]


def spoil(root, *names):
    for name in names:
        (root / name).write_bytes(b"")


def test_the_whole_of_a_wide_picture_is_on_the_canvas():
    pixels = np.zeros((20, 80, 3), dtype=np.uint8)
    pixels[:, 40:] = 255
    square = squeeze(Image.fromarray(pixels), 20)
    assert square.shape == (3, 20, 20)
    assert (square[..., :9] == 0).all()
    assert (square[..., 11:] == 255).all()


def test_a_canvas_is_antialiased():
    checker = np.indices((64, 64)).sum(0) % 2 * 255
    square = squeeze(Image.fromarray(np.repeat(checker[..., None], 3, 2).astype(np.uint8)), 16)
    assert (square.int() - 127).abs().max() <= 8


@pytest.mark.parametrize(("height", "width"), [(50, 81), (81, 50), (20, 30), (32, 32), (33, 47)])
def test_eval_image_equals_torchvisions_resize_and_center_crop(height, width):
    picture = noise(height, width)
    reference = v2.CenterCrop(28)(v2.Resize(32)(picture))
    assert np.array_equal(
        eval_image(picture, resize_size=32, image_size=28).permute(1, 2, 0), np.asarray(reference)
    )


def test_normalize_equals_torchvisions():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    torch.testing.assert_close(
        normalize(images, mean, std), v2.functional.normalize(images.float() / 255, mean, std)
    )


def test_training_images_keep_the_true_sizes(tmp_path):
    noise(10, 30).save(tmp_path / "x.png")
    noise(6, 4).save(tmp_path / "y.png")
    batch = next(training(tmp_path).batches(0, 0, batch_size=2))
    assert batch.sizes[np.argsort(batch.indices)].tolist() == [[10, 30], [6, 4]]


def test_canvases_are_those_of_their_indices(write_images):
    data = training(write_images(10))
    batch = next(data.batches(0, 0, batch_size=4))
    for index, square in zip(batch.indices, batch.images, strict=True):
        assert torch.equal(square, squeeze(data.source.read(int(index)), 8))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_streaming_gives_the_batches_of_the_cache(write_images, workers):
    root = write_images(23, side=11)
    cached, streaming = training(root), training(root, cache_mib=0, workers=workers)
    assert cached.is_cached
    assert not streaming.is_cached
    for epoch in range(2):
        assert rows(cached.batches(5, epoch, batch_size=4)) == rows(streaming.batches(5, epoch, batch_size=4))


def test_an_epoch_shows_every_image_at_most_once_and_drops_the_partial_batch(write_images):
    batches = list(training(write_images(11)).batches(0, 0, batch_size=4))
    indices = np.concatenate([batch.indices for batch in batches])
    assert [len(batch.indices) for batch in batches] == [4, 4]
    assert len(set(indices.tolist())) == 8


def test_another_epoch_has_another_order(write_images):
    data = training(write_images(30))
    assert rows(data.batches(0, 0, batch_size=30)) != rows(data.batches(0, 1, batch_size=30))


@pytest.mark.parametrize("cache_mib", [0, 64])
def test_an_epoch_resumes_at_any_step(write_images, cache_mib):
    data = training(write_images(20), cache_mib=cache_mib)
    whole = rows(data.batches(1, 2, batch_size=4))
    assert rows(data.batches(1, 2, batch_size=4, start_step=3)) == whole[3:]


@pytest.mark.parametrize("cache_mib", [0, 64])
def test_two_processes_share_the_batches_of_one(write_images, cache_mib):
    data = training(write_images(20), cache_mib=cache_mib)
    alone = list(data.batches(1, 0, batch_size=6))
    shares = [list(data.batches(1, 0, batch_size=6, rank=rank, world_size=2)) for rank in range(2)]
    for one, *two in zip(alone, *shares, strict=True):
        assert np.array_equal(one.indices, np.concatenate([part.indices for part in two]))
        assert torch.equal(one.images, torch.cat([part.images for part in two]))


def test_a_batch_larger_than_the_data_is_an_error(write_images):
    root = write_images(10)
    with pytest.raises(DataError) as caught:
        training(root).batches(0, 0, batch_size=256)
    assert "a batch of 256 is larger than the data: 10 images" in caught.value.problem
    assert "batch_size to 10 or less" in caught.value.hint


def test_unreadable_images_are_skipped_and_named(write_images):
    root = write_images(10, classes=("a", "b"))
    spoil(root, "a/002.png")
    data = training(root, max_bad_fraction=0.1)
    assert len(data) == 9
    assert data.skipped == (str(root / "a/002.png"),)
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]


def test_streaming_replaces_an_unreadable_image_by_the_next(write_images):
    root = write_images(10)
    good = rows(training(root, cache_mib=0).batches(0, 0, batch_size=10))[0]
    spoil(root, "004.png", "009.png")
    data = training(root, cache_mib=0, max_bad_fraction=0.2)
    ((indices, images, _),) = rows(data.batches(0, 0, batch_size=10))
    assert indices == [{4: 5, 9: 0}.get(index, index) for index in good[0]]
    assert images[indices.index(5)] == good[1][good[0].index(5)]
    assert data.skipped == (str(root / "004.png"), str(root / "009.png"))


@pytest.mark.parametrize("cache_mib", [0, 64])
def test_too_many_unreadable_images_are_an_error(write_images, cache_mib):
    root = write_images(20)
    spoil(root, "003.png")
    (root / "007.png").write_text("no image")
    with pytest.raises(DataError, match="2 of 20 images cannot be read") as caught:
        list(
            training(root, cache_mib=cache_mib, workers=0, max_bad_fraction=0.05).batches(0, 0, batch_size=20)
        )
    assert [line.strip() for line in caught.value.where["unreadable"].splitlines()] == [
        f"{root}/003.png (empty file)",
        f"{root}/007.png (not a JPEG, PNG, WebP or BMP file)",
    ]
    assert "[data] max_bad_fraction" in caught.value.hint


def test_at_most_five_unreadable_images_are_listed(write_images):
    root = write_images(20)
    spoil(root, *(f"{index:03}.png" for index in range(7)))
    with pytest.raises(DataError) as caught:
        training(root)
    lines = caught.value.where["unreadable"].splitlines()
    assert len(lines) == 6
    assert lines[-1].strip() == "and 2 more"


@pytest.mark.parametrize("cache_mib", [0, 64])
def test_all_images_unreadable_is_an_error_even_if_all_are_allowed(write_images, cache_mib):
    root = write_images(3)
    spoil(root, "000.png", "001.png", "002.png")
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        list(training(root, cache_mib=cache_mib, max_bad_fraction=1.0).batches(0, 0, batch_size=3))


@pytest.mark.parametrize(
    ("classes", "limit", "chosen"), [([50, 30, 20], 10, [4, 3, 3]), ([97, 3], 20, [17, 3])]
)
def test_a_limit_is_even_over_the_classes_as_far_as_they_go(classes, limit, chosen):
    labels = np.repeat(range(len(classes)), classes)
    assert np.bincount(labels[choose_images(labels, 100, limit)]).tolist() == chosen


def test_a_limit_without_labels_chooses_over_the_whole_data():
    chosen = choose_images(None, 1000, 100)
    assert len(set(chosen.tolist())) == 100
    assert 350 < chosen.mean() < 650


def test_eval_images_come_in_the_order_of_the_data(write_images):
    source = open_source(str(write_images(70, classes=("a", "b"))))
    loaded = load_eval_images(source, resize_size=8, image_size=8)
    assert loaded.labels.tolist() == source.labels.tolist()
    assert torch.equal(loaded.images[69], squeeze(source.read(69), 8))


def test_eval_images_skip_and_name_the_unreadable(write_images):
    root = write_images(10, classes=("a", "b"))
    spoil(root, "b/001.png")
    loaded = load_eval_images(open_source(str(root)), resize_size=8, image_size=8, max_bad_fraction=0.1)
    assert loaded.skipped == (str(root / "b/001.png"),)
    assert loaded.labels.tolist() == [0] * 5 + [1] * 4
    assert len(loaded.images) == 9


def test_holdout_takes_the_fraction_of_every_class():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    stay, held = split_holdout(labels, 0.2, seed=0)
    assert np.bincount(labels[held]).tolist() == [20, 10, 2]
    assert sorted([*stay, *held]) == list(range(160))


def test_holdout_leaves_at_least_one_of_each_class():
    stay, held = split_holdout(np.array([0, 0, 1, 2, 2]), 0.9, seed=0)
    assert np.array([0, 0, 1, 2, 2])[stay].tolist() == [0, 1, 2]
    assert len(held) == 2


def test_another_seed_holds_out_others():
    labels = np.repeat([0, 1], 50)
    assert not np.array_equal(split_holdout(labels, 0.2, 1)[1], split_holdout(labels, 0.2, 2)[1])


def test_holdout_of_single_images_is_an_error():
    with pytest.raises(DataError, match="no images can be held out: 2 images in 2 classes"):
        split_holdout(np.array([0, 1]), 0.5, seed=0)


def endless(path):
    path.symlink_to("/dev/zero")


def huge(path):
    with path.open("wb") as file:
        file.truncate(3 * 2**29)


@pytest.mark.parametrize(
    ("put", "reason"),
    [
        (os.mkfifo, "no longer a file"),
        (endless, "no longer a file"),
        (os.mkdir, "Is a directory"),
        (huge, "1.5 GiB are suspiciously much"),
    ],
)
def test_what_has_taken_a_pictures_place_is_left_out(write_images, put, reason):
    """After the folder was listed, which finds such things itself."""
    root = write_images(10)
    data = training(root, cache_mib=0, max_bad_fraction=0.1)
    (root / "004.png").unlink()
    put(root / "004.png")
    batches = list(data.batches(0, 0, batch_size=5))
    assert sum(len(batch.indices) for batch in batches) == 10
    assert list(data.skipped) == [str(root / "004.png")]
    with pytest.raises(UnreadableImage, match=reason):
        data.source.read(4)


@pytest.fixture
def pipe_instead_of(monkeypatch):
    """Put a file that never answers in the place of another; its readers are let go after the test.

    A pipe itself would be found out; here it stands for a file on a share that hangs, and is read as such.
    """
    pipes = []
    monkeypatch.setattr("edgecl.data.folder.read_plain_file", lambda path: Path(path).read_bytes())

    def put(path):
        path.unlink()
        os.mkfifo(path)
        pipes.append(path)

    yield put
    for path in pipes:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


@contextlib.contextmanager
def no_answer(path):
    with pytest.raises(DataError, match="a file does not answer") as caught:
        yield
    assert caught.value.where == {"data": str(path.parent), "waiting for": f"{path} (0 s)"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("decode", ["cpu", "cuda"])
def test_a_file_that_does_not_answer_ends_the_run_with_its_name(
    write_images, pipe_instead_of, workers, decode
):
    root = write_images(10)
    data = training(root, cache_mib=0, workers=workers, read_timeout_s=0.3, decode=decode)
    pipe_instead_of(root / "007.png")
    with no_answer(root / "007.png"):
        list(data.batches(0, 0, batch_size=5))


def first_at(data, index, *, before):
    """A seed that asks for one picture well before another."""
    for seed in range(1000):
        order = permutation(seed, 0, len(data)).tolist()
        if order.index(index) + 5 < order.index(before):
            return seed
    raise AssertionError


def test_the_file_in_place_of_an_unreadable_one_is_the_one_that_is_named(write_images, pipe_instead_of):
    root = write_images(10)
    data = training(root, cache_mib=0, read_timeout_s=0.3, max_bad_fraction=0.5)
    spoil(root, "006.png")
    pipe_instead_of(root / "007.png")
    with no_answer(root / "007.png"):
        # Before the seventh picture itself is asked for, it is asked for in place of the sixth.
        list(data.batches(first_at(data, 6, before=7), 0, batch_size=1))


def test_a_file_that_does_not_answer_ends_reading_into_memory(write_images, pipe_instead_of):
    root = write_images(10)
    source = open_source(str(root))
    pipe_instead_of(root / "007.png")
    with no_answer(root / "007.png"):
        TrainingImages(source, decode_size=8, read_timeout_s=0.3)
    with no_answer(root / "007.png"):
        load_eval_images(source, resize_size=8, image_size=8, read_timeout_s=0.3)
