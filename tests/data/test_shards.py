"""Shards as a source of images: their classes, the order of an epoch, the fingerprint, the pattern that names them."""

import os
import sys
import tarfile

import numpy as np
import pytest

pytest.importorskip("webdataset")

from webdataset.shardlists import expand_urls

from edgecl.data import shards
from edgecl.data.loading import TrainingImages
from edgecl.data.source import UnreadableImage
from edgecl.data.sources import absolute_uri, open_source
from edgecl.errors import DataError

from .tar_shards import exc, numbers, pattern, picture, write_tar

pytestmark = pytest.mark.usefixtures("cache")


# --- what they hold ---


def test_pictures_come_in_the_order_of_the_shards_with_their_classes(write_shards):
    source = open_source(pattern(write_shards(3), 2))
    assert numbers(source) == list(range(12))
    assert source.classes == ("0", "1", "2")
    assert source.labels.tolist() == [number % 3 for number in range(12)]


def test_a_picture_is_named_by_its_shard_and_its_member(write_shards):
    root = write_shards(2)
    assert open_source(pattern(root, 1)).describe(5) == f"{root}/x-001.tar:000005.png"


def test_patterns_joined_by_two_colons_and_folders_name_their_shards(write_shards):
    one, two = write_shards(2), write_shards(1, folder="more")
    assert numbers(open_source(f"shards:{two}/x-000.tar::{one}")) == [0, 1, 2, 3, *range(8)]


def test_no_cls_members_means_no_labels(write_shards, capsys):
    assert open_source(pattern(write_shards(2, classes=0), 1)).labels is None
    assert capsys.readouterr().err == ""


def test_a_picture_without_a_class_means_no_labels_and_is_said(tmp_path, capsys):
    write_tar(
        tmp_path / "x.tar", [("a.png", picture(1)), ("a.cls", b"0"), ("b.png", picture(2)), ("b.cls", b"-1")]
    )
    source = open_source(f"shards:{tmp_path}/x.tar")
    assert source.labels is None
    assert "1 of 2 images" in capsys.readouterr().err


def test_pictures_that_share_a_key_are_counted(tmp_path, capsys):
    """Dates in names hold dots, and what shares a name up to the first dot is one sample."""
    members = [(f"2024.01.{day:02}.png", picture(day)) for day in range(1, 4)]
    uri = f"shards:{write_tar(tmp_path / 'x.tar', [*members, ('b.png', picture(9))])}"
    for _ in range(2):  # read, and from the kept index
        assert len(open_source(uri)) == 2
        assert f"2 images of '{uri}' not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "classes", "labels"),
    [
        ([b"dog\n", b"cat"], ("cat", "dog"), [1, 0]),
        ([b"3"], ("0", "1", "2", "3"), [3]),  # room for classes that are not there
        ([b"9000001", b"12"], ("12", "9000001"), [1, 0]),  # too large for numbers of classes
    ],
)
def test_text_in_cls_members_makes_the_classes(tmp_path, texts, classes, labels):
    members = [
        member
        for key, text in zip("ab", texts, strict=False)
        for member in ((f"{key}.png", picture(1)), (f"{key}.cls", text))
    ]
    source = open_source(f"shards:{write_tar(tmp_path / 'x.tar', members)}")
    assert (source.classes, source.labels.tolist()) == (classes, labels)


# --- the order of an epoch ---


def steps(images, **options):
    return [
        batch.indices.tolist()
        for batch in images.batches(7, options.pop("epoch", 0), batch_size=8, **options)
    ]


@pytest.fixture
def many(write_shards, monkeypatch):
    """Twenty shards of five pictures, in windows of four shards."""
    monkeypatch.setattr(shards, "WINDOW_SHARDS", 4)
    monkeypatch.setattr(shards, "WINDOW_IMAGES", 1)
    return open_source(pattern(write_shards(20, each=5), 19))


def training(source, **options):
    return TrainingImages(source, decode_size=8, workers=0, **options)


def test_an_epoch_has_every_picture_once_and_stays_within_few_shards(many):
    order = many.order(7, 0, np.arange(100))
    assert sorted(order.tolist()) == list(range(100))
    windows = [{index // 5 for index in order[start : start + 20].tolist()} for start in range(0, 100, 20)]
    assert [len(window) for window in windows] == [4] * 5
    assert set.union(*windows) == set(range(20))
    # Shuffled within a window, not shard after shard.
    assert any(
        len({index // 5 for index in order[start : start + 5].tolist()}) > 1 for start in range(0, 100, 20)
    )


def test_windows_are_of_more_shards_until_they_hold_enough_pictures(many, monkeypatch):
    monkeypatch.setattr(shards, "WINDOW_IMAGES", 50)
    order = many.order(7, 0, np.arange(100))
    assert [len({index // 5 for index in half.tolist()}) for half in (order[:50], order[50:])] == [10, 10]


def test_every_epoch_and_seed_puts_other_shards_together(many):
    orders = [many.order(seed, epoch, np.arange(100)) for seed, epoch in [(7, 0), (7, 1), (8, 0)]]
    first = [frozenset((order[:20] // 5).tolist()) for order in orders]
    assert len(set(first)) == 3


@pytest.mark.parametrize("cache_mib", [0, 4096])
def test_training_takes_the_order_of_the_shards(many, cache_mib):
    images = training(many, cache_mib=cache_mib)
    batches = list(images.batches(7, 3, batch_size=8))
    order = many.order(7, 3, np.arange(100))[:96]
    np.testing.assert_array_equal(np.concatenate([batch.indices for batch in batches]), order)
    assert [int(batch.images[0, 0, 0, 0]) for batch in batches] == order[::8].tolist()


def test_a_limited_set_keeps_to_the_order_of_its_shards(many):
    images = training(many, limit=40)
    order = np.concatenate(steps(images))
    assert sorted(order.tolist()) == list(range(40))
    np.testing.assert_array_equal(order, many.order(7, 0, images._chosen))


def test_a_part_of_the_images_keeps_the_order_of_the_shards(many):
    part = np.arange(0, 100, 2)
    np.testing.assert_array_equal(many.take(part).order(7, 0, np.arange(50)), many.order(7, 0, part))


# --- the fingerprint ---


def test_fingerprint_does_not_depend_on_the_place(write_shards):
    one, two = write_shards(2), write_shards(2, folder="elsewhere")
    assert open_source(pattern(one, 1)).fingerprint == open_source(pattern(two, 1)).fingerprint


def changed_name(root):
    (root / "x-001.tar").rename(root / "y.tar")
    return f"shards:{root}/x-000.tar::{root}/y.tar"


def changed_order(root):
    return f"shards:{root}/x-001.tar::{root}/x-000.tar"


def changed_label(root):
    content = (root / "x-000.tar").read_bytes()
    with tarfile.open(root / "x-000.tar") as archive:
        offset = archive.getmember("000001.cls").offset_data
    assert content[offset : offset + 1] == b"1"
    (root / "x-000.tar").write_bytes(content[:offset] + b"2" + content[offset + 1 :])
    return pattern(root, 1)


def changed_member(root):
    members = [(f"{number:06}.png", picture(number)) for number in range(4)]
    write_tar(root / "x-000.tar", members)
    return pattern(root, 1)


@pytest.mark.parametrize("change", [changed_name, changed_order, changed_label, changed_member])
def test_fingerprint_changes_with_what_is_in_the_shards(write_shards, change):
    root = write_shards(2)
    before = open_source(pattern(root, 1)).fingerprint
    assert open_source(change(root)).fingerprint != before


# --- shards that are missing, or change during the run ---


def test_missing_shards_are_named_and_the_others_counted(write_shards):
    root = write_shards(3)
    (root / "x-001.tar").unlink()
    error = exc(pattern(root, 3))
    assert "2 of 4 shards" in error.problem
    assert error.where["missing"] == f"{root}/x-001.tar, {root}/x-003.tar"


def test_a_folder_without_shards_says_what_was_looked_for(tmp_path):
    (tmp_path / "x.tar.gz").touch()
    assert "no .tar files" in exc(f"shards:{tmp_path}").problem


@pytest.mark.parametrize(
    "twice",
    [
        "{root}/x-000.tar::{root}/x-000.tar",
        "{root}/x-{{000..001}}.tar::{root}/x-{{000..000}}.tar",
        "{root}/x-000.tar::{root}/../{root.name}/x-000.tar",
        "{root}::{root}/x-000.tar",
        "{root}/x-000.tar::file:{root}/x-000.tar",
    ],
)
def test_a_shard_named_twice_is_refused(write_shards, twice):
    pattern = "shards:" + twice.format(root=write_shards(2))
    error = exc(pattern)
    assert "'x-000.tar' is named twice" in error.problem
    assert error.where["data"] == pattern


def test_a_remote_shard_named_twice_is_refused_however_it_is_signed():
    error = exc("shards:http://h.example/x.tar?Signature=geheim::http://h.example/x.tar?Signature=streng")
    assert "'x.tar' is named twice" in error.problem
    assert "geheim" not in str(error)
    assert "streng" not in str(error)


def test_a_shard_that_shrinks_during_the_run_is_counted_and_named(write_shards):
    root = write_shards(2)
    images = training(open_source(pattern(root, 1)), cache_mib=0)
    before = (root / "x-001.tar").stat().st_size
    os.truncate(root / "x-001.tar", 512)
    with pytest.raises(DataError) as caught:
        list(images.batches(0, 0, batch_size=8))
    assert f"shrank from {before:,} to 512 bytes" in str(caught.value)
    assert f"{root}/x-001.tar:0000" in str(caught.value)


def test_a_shard_replaced_during_the_run_is_not_read(write_shards):
    root = write_shards(1)
    source = open_source(pattern(root, 0))
    write_tar(root / "x-000.tar", [(f"{number}.png", picture(number)) for number in range(90, 110)])
    with pytest.raises(UnreadableImage, match="its shard changed since it was indexed"):
        source.read(0)


# --- the pattern ---


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "names no shards"),
        ("x-{000..001.tar", "Unbalanced braces"),
        ("https://me:geheim@host/x-{000..001.tar?sig=geheim", "Unbalanced braces"),
        ("${NOT_SET}/x.tar", "WDS_NOT_SET is not set"),
        ("{" * 5000 + "}" * 5000, "cannot be read"),
        ("{0.." + "9" * 5000 + "}.tar", "cannot be read"),
        ("http://[::1", "is no URL"),
        ("http://[x]/y.tar", "is no URL"),
    ],
    ids=range(8),
)
def test_a_pattern_that_cannot_be_read_is_named_without_its_secrets(pattern, words):
    error = exc(f"shards:{pattern}")
    assert words in error.problem
    assert error.hint
    assert "geheim" not in str(error)


@pytest.mark.parametrize(
    "pattern",
    [
        "x{0..99999999}.tar",
        "x{0..99999}{0..99999}.tar",
        "x{{0..99999}{0..99999}}.tar",
        "x{a,{0..9999999}}.tar",
        "x{999999999..-999999999..2}.tar",
        "{a..Z}{a..Z}{a..z}{a..z}{a..z}.tar",
        "{0..600000}.tar::{0..600000}.tar",
        "{,a}" * 40,
        "${BRACES}.tar",
    ],
)
def test_a_pattern_for_more_shards_than_there_are_is_refused_before_it_is_expanded(pattern, monkeypatch):
    monkeypatch.setenv("WDS_BRACES", "{0..99999999}")
    monkeypatch.setattr("webdataset.shardlists.expand_urls", lambda pattern: pytest.fail("expanded"))
    assert "stands for" in exc(f"shards:{pattern}").problem


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("x.tar", 1),
        ("x{000..127}.tar", 128),
        ("{5..1..2}{b,{c,d}e}", 9),
        ("{a,b}{0..3}", 8),
        (r"{a\,b,c}", 2),
        (r"\{0..3\}", 1),
        ("{a}", 1),
        ("{a{0..2}}", 3),
        ("{train-{00..99},val-{00..09}}.tar", 110),
        ("a,b", 1),
        ("{a..e..2}", 3),
        ("}{{0..9}", 10),
    ],
)
def test_shards_are_counted_as_webdataset_expands_them(pattern, count):
    assert shards._expansions(pattern) == count
    assert len(expand_urls(pattern)) == count


def test_a_tar_file_without_the_scheme_is_told_the_scheme(write_shards):
    path = write_shards(1) / "x-000.tar"
    assert f"shards:{path}" in exc(str(path)).hint


def test_shards_on_the_disk_need_no_package_of_remote_ones(write_shards, monkeypatch):
    for package in ("webdataset", "fsspec", "aiohttp", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    assert len(open_source(pattern(write_shards(2), 1))) == 8


def test_an_absolute_uri_means_the_same_from_anywhere(write_shards, monkeypatch, tmp_path):
    write_shards(2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WDS_PLACE", "data")
    for uri in [
        "shards:data/x-{000..001}.tar",
        "shards:{data/x-000,./data/x-001}.tar",
        "shards:${PLACE}",
    ]:
        absolute = absolute_uri(uri)
        assert f"{tmp_path}/data" in absolute
        before = open_source(uri).fingerprint
        monkeypatch.chdir("/")
        assert open_source(absolute).fingerprint == before
        monkeypatch.chdir(tmp_path)
    assert absolute_uri("shards:s3://bucket/x-{0..9}.tar") == "shards:s3://bucket/x-{0..9}.tar"
