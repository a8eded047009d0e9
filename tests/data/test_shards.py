import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("webdataset")

from webdataset import TarWriter

from edgecl.data import fetching, shards
from edgecl.data.fetching import cached_place
from edgecl.data.loading import TrainingImages, load_eval_images
from edgecl.data.sources import UnreadableImage, absolute_uri, has_test_split, list_datasets, open_source
from edgecl.errors import DataError


def picture(number, *, side=8):
    """A picture whose every pixel tells its number."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 7)).save(stream, "PNG")
    return stream.getvalue()


def number_of(image):
    red, green, _ = np.asarray(image)[0, 0].tolist()
    return red + 256 * green


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGECL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    return tmp_path / "cache" / "shards"


@pytest.fixture
def write_shards(tmp_path):
    """Write shards with WebDataset's own writer: pictures numbered through, a class each unless told otherwise."""

    def write(count, *, each=4, classes=3, folder="data"):
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        for shard in range(count):
            with TarWriter(str(root / f"x-{shard:03}.tar")) as writer:
                for number in range(shard * each, (shard + 1) * each):
                    sample = {"__key__": f"{number:06}", "png": picture(number), "json": {"number": number}}
                    writer.write(sample | ({"cls": number % classes} if classes else {}))
        return root

    return write


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


def complaint(uri):
    with pytest.raises(DataError) as caught:
        open_source(uri)
    return caught.value


# --- what is in the shards ---


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
    source = open_source(pattern(write_shards(2, classes=0), 1))
    assert source.labels is None
    assert source.classes is None
    assert capsys.readouterr().err == ""


def test_a_picture_without_a_class_means_no_labels_and_is_said(tmp_path, capsys):
    write_tar(
        tmp_path / "x.tar", [("a.png", picture(1)), ("a.cls", b"0"), ("b.png", picture(2)), ("b.cls", b"-1")]
    )
    source = open_source(f"shards:{tmp_path}/x.tar")
    assert source.labels is None
    assert capsys.readouterr().err == (
        f"edgecl: 1 of 2 images of 'shards:{tmp_path}/x.tar' have no class, so all are taken without\n"
    )


def test_text_in_cls_members_names_the_classes(tmp_path):
    members = [("a.png", picture(1)), ("a.cls", b"dog\n"), ("b.png", picture(2)), ("b.cls", b"cat")]
    source = open_source(f"shards:{write_tar(tmp_path / 'x.tar', members)}")
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [1, 0]


def test_class_numbers_leave_room_for_classes_that_are_not_there(tmp_path):
    members = [("a.png", picture(1)), ("a.cls", b"3")]
    source = open_source(f"shards:{write_tar(tmp_path / 'x.tar', members)}")
    assert source.classes == ("0", "1", "2", "3")
    assert source.labels.tolist() == [3]


def test_numbers_too_large_for_classes_are_names(tmp_path):
    members = [("a.png", picture(1)), ("a.cls", b"9000001"), ("b.png", picture(2)), ("b.cls", b"12")]
    source = open_source(f"shards:{write_tar(tmp_path / 'x.tar', members)}")
    assert source.classes == ("12", "9000001")
    assert source.labels.tolist() == [1, 0]


def test_members_of_a_sample_may_lie_apart_and_have_several_dots(tmp_path):
    members = [
        ("v1.0/a.mask.png", picture(90)),
        ("v1.0/a.PNG", picture(1)),
        ("v1.0/b.png", picture(2)),
        ("v1.0/c.txt", b"no picture"),
        ("__meta__/d.png", picture(91)),
        ("v1.0/b.cls", b"1"),
        ("v1.0/a.cls", b"0"),
    ]
    source = open_source(f"shards:{write_tar(tmp_path / 'x.tar', members)}")
    assert numbers(source) == [1, 2]
    assert source.labels.tolist() == [0, 1]


def test_long_and_odd_names_are_read(tmp_path):
    name = "ordner/" + "ü" * 150 + ".png"
    source = open_source(
        f"shards:{write_tar(tmp_path / 'x.tar', [(name, picture(5)), ('./b.png', picture(6))])}"
    )
    assert numbers(source) == [5, 6]
    assert source.describe(0).endswith(name)


def test_jpegs_in_shards_are_decoded_at_a_reduced_scale(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (640, 320)).save(stream, "JPEG")
    source = open_source(f"shards:{write_tar(tmp_path / 'x.tar', [('a.jpg', stream.getvalue())])}")
    image, height, width = source.read_reduced(0, at_least=64)
    assert (image.size, height, width) == ((160, 80), 320, 640)


def test_a_broken_picture_is_unreadable_and_named(tmp_path):
    source = open_source(f"shards:{write_tar(tmp_path / 'x.tar', [('a.png', b'not found'), ('b.png', b'')])}")
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        source.read(0)
    with pytest.raises(UnreadableImage, match="empty file"):
        source.read(1)


def test_pictures_are_measured_with_their_labels(write_shards):
    source = open_source(pattern(write_shards(2), 1))
    loaded = load_eval_images(source, resize_size=8, image_size=8)
    assert loaded.images[:, 0, 0, 0].tolist() == list(range(8))
    assert loaded.labels.tolist() == [number % 3 for number in range(8)]


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
    return TrainingImages(source, canvas_size=8, workers=0, **options)


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
    assert [int(batch.canvases[0, 0, 0, 0]) for batch in batches] == order[::8].tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_order_is_the_same_on_any_number_of_processes(many, world_size):
    images = training(many)
    alone = steps(images)
    ranks = [steps(images, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [[*chain(*parts)] for parts in zip(*ranks, strict=True)] == alone


def test_an_epoch_is_taken_up_in_its_middle(many):
    assert steps(training(many, cache_mib=0), epoch=2, start_step=5) == steps(training(many), epoch=2)[5:]


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


# --- the index ---


def test_an_index_is_kept_and_the_shard_not_read_again(write_shards, monkeypatch, cache):
    uri = pattern(write_shards(2), 1)
    before = open_source(uri)
    assert len(list((cache / "indices").glob("*.npz"))) == 2
    monkeypatch.setattr(tarfile, "open", None)
    after = open_source(uri)
    assert after.fingerprint == before.fingerprint
    assert after.labels.tolist() == before.labels.tolist()
    assert numbers(after) == list(range(8))


def test_a_changed_shard_is_indexed_again(write_shards):
    root = write_shards(1)
    open_source(pattern(root, 0))
    write_tar(root / "x-000.tar", [("a.png", picture(300))])
    assert numbers(open_source(pattern(root, 0))) == [300]


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda content: b"", lambda _: b"PK"]
)
def test_a_torn_index_is_made_anew(write_shards, cache, damage):
    uri = pattern(write_shards(1), 0)
    open_source(uri)
    (kept,) = (cache / "indices").glob("*.npz")
    kept.write_bytes(damage(kept.read_bytes()))
    assert numbers(open_source(uri)) == [0, 1, 2, 3]
    np.load(kept).close()


def test_local_shards_need_no_cache(write_shards, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGECL_CACHE", str(tmp_path / "file"))
    assert numbers(open_source(pattern(write_shards(1), 0))) == [0, 1, 2, 3]


# --- what is wrong with a shard ---


def test_missing_shards_are_named_and_the_others_counted(write_shards):
    root = write_shards(3)
    (root / "x-001.tar").unlink()
    assert str(complaint(pattern(root, 3))) == (
        "2 of 4 shards are missing\n"
        f"  data:    shards:{root}/x-{{000..003}}.tar\n"
        f"  missing: {root}/x-001.tar\n"
        f"           {root}/x-003.tar\n"
        "  there:   2 of 4\n"
        "  hint:    compare the pattern's braces with what is there"
    )


def test_many_missing_shards_are_counted(tmp_path):
    assert f"{tmp_path}/x-004.tar and 15 more\n" in str(complaint(pattern(tmp_path, 19)))


def test_a_truncated_shard_says_how_much_of_it_is_whole(write_shards):
    path = write_shards(1) / "x-000.tar"
    with tarfile.open(path) as archive:
        member = archive.getmember("000002.png")
    os.truncate(path, member.offset_data + 10)
    expected = member.offset_data + -(-member.size // 512) * 512
    assert str(complaint(f"shards:{path}")) == (
        "the shard 'x-000.tar' is cut short: it ends inside '000002.png', after 2 whole samples\n"
        f"  shard: {path}\n"
        f"  bytes: {member.offset_data + 10:,}, at least {expected:,} expected\n"
        "  hint:  copy or fetch it again"
    )


@pytest.mark.parametrize("more", [0, 100])
def test_a_shard_cut_between_members_lacks_its_end_mark(write_shards, more):
    path = write_shards(1) / "x-000.tar"
    with tarfile.open(path) as archive:
        os.truncate(path, archive.getmember("000003.png").offset + more)
    error = complaint(f"shards:{path}")
    # The fourth sample's other members come before its picture, so three are whole.
    assert (
        error.problem
        == "the shard 'x-000.tar' is cut short: after 3 whole samples the tar's end mark is missing"
    )
    assert error.hint == "copy or fetch it again; whoever wrote it must close the writer"


def test_a_shard_damaged_in_its_middle_is_found(write_shards):
    path = write_shards(1) / "x-000.tar"
    with tarfile.open(path) as archive:
        start = archive.getmember("000002.png").offset
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 512)
    assert complaint(f"shards:{path}").problem == (
        f"the shard 'x-000.tar' is damaged at byte {start:,}: no tar header there, after 2 whole samples"
    )


def test_a_shard_cut_inside_a_header_is_cut_short(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", picture(0)), ("ü" * 150 + ".png", picture(1))])
    with tarfile.open(path) as archive:
        long = archive.getmembers()[1]
    os.truncate(path, long.offset_data - 512)
    assert complaint(f"shards:{path}").problem == (
        "the shard 'x.tar' is cut short: it ends inside a header, after 1 whole samples"
    )


def test_a_damaged_long_name_is_no_cut(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", picture(0)), ("ü" * 150 + ".png", picture(1))])
    with tarfile.open(path) as archive:
        long = archive.getmembers()[1]
    with path.open("r+b") as file:
        file.seek(long.offset_data - 512)
        file.write(b"\xff" * 512)
    assert complaint(f"shards:{path}").problem == (
        "the shard 'x.tar' is damaged: bad checksum, after 1 whole samples"
    )


def test_joined_tar_files_are_not_read_halfway(write_shards, tmp_path):
    root = write_shards(2)
    joined = tmp_path / "joined.tar"
    joined.write_bytes((root / "x-000.tar").read_bytes() + (root / "x-001.tar").read_bytes())
    error = complaint(f"shards:{joined}")
    assert error.problem == "the shard 'joined.tar' goes on after its end mark, after 4 samples"
    assert error.hint == "tar files cannot be joined with `cat`; name them both, with '::' between"


def test_a_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    error = complaint(f"shards:{tmp_path}/x.tar.gz")
    assert error.problem == (
        "the shard 'x.tar.gz' is compressed, so no image in it can be read without all before it"
    )
    assert error.hint == "unpack it to a plain .tar; JPEG files do not shrink any further"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the shard 'x.tar' is empty"),
        (b"<html>404</html>" * 100, "'x.tar' is not a tar file"),
        (bytes(10240), "no images in the 1 shards of 'shards:{}/x.tar'"),
    ],
)
def test_what_is_no_shard_is_named(tmp_path, content, problem):
    (tmp_path / "x.tar").write_bytes(content)
    assert complaint(f"shards:{tmp_path}/x.tar").problem == problem.format(tmp_path)


def test_a_shard_nobody_may_read_is_named(write_shards):
    path = write_shards(1) / "x-000.tar"
    path.unlink()
    path.symlink_to(path.name)
    # A loop of links counts as missing, a folder of that name as a folder without shards.
    assert complaint(f"shards:{path}").problem == f"there is no shard '{path}'"
    path.unlink()
    path.mkdir()
    assert complaint(f"shards:{path}").problem == f"no .tar files in the folder '{path}'"


def link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        ("../../etc/cron.d/a.png", "has a path that climbs out of the shard: '../../etc/cron.d/a.png'"),
        ("a/../../b.png", "has a path that climbs out of the shard: 'a/../../b.png'"),
        ("/etc/a.png", "has a path that climbs out of the shard: '/etc/a.png'"),
        ("../\x1b[2J.txt", "has a path that climbs out of the shard: '../\\x1b[2J.txt'"),
        (link("a.png", "/etc/passwd", tarfile.SYMTYPE), "is a symbolic link: 'a.png'"),
        (link("b.png", "a.png", tarfile.LNKTYPE), "is a hard link: 'b.png'"),
        (link("sda.png", "", tarfile.BLKTYPE), "is a device: 'sda.png'"),
        (link("tty.png", "", tarfile.CHRTYPE), "is a device: 'tty.png'"),
        (link("queue.png", "", tarfile.FIFOTYPE), "is a named pipe: 'queue.png'"),
    ],
)
def test_a_member_that_has_no_place_in_a_shard_is_refused(tmp_path, member, problem, cache):
    path = write_tar(tmp_path / "x.tar", [("0.png", picture(0)), (member, picture(1))])
    assert str(complaint(f"shards:{path}")) == (
        f"a member of the shard 'x.tar' {problem}\n"
        f"  shard: {path}\n"
        "  hint:  do not trust a shard with such a member; write it again with regular files alone"
    )
    # Nothing is kept of it, and nothing was unpacked.
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()) == [
        "x.tar"
    ]


def test_the_same_member_twice_is_refused(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", [("a.png", picture(0)), ("b.png", picture(1)), ("a.png", picture(2))]
    )
    error = complaint(f"shards:{path}")
    assert error.problem == "the shard 'x.tar' holds 'a.png' twice"
    assert error.hint == "write the shard again, with a key of its own for every sample"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a\0b", b"long" * 500])
def test_a_label_that_is_no_short_text_is_refused(tmp_path, content):
    path = write_tar(tmp_path / "x.tar", [("a.png", picture(0)), ("a.cls", content)])
    error = complaint(f"shards:{path}")
    assert error.problem == "the label 'a.cls' in the shard 'x.tar' is no short text"


def test_a_shard_that_shrinks_during_the_run_is_counted_and_named(write_shards):
    root = write_shards(2)
    images = training(open_source(pattern(root, 1)), cache_mib=0)
    before = (root / "x-001.tar").stat().st_size
    os.truncate(root / "x-001.tar", 512)
    with pytest.raises(DataError) as caught:
        list(images.batches(0, 0, batch_size=8))
    assert f"its shard shrank from {before:,} to 512 bytes since it was indexed" in str(caught.value)
    assert f"{root}/x-001.tar:0000" in str(caught.value)


def test_a_shard_replaced_during_the_run_is_not_read(write_shards):
    root = write_shards(1)
    source = open_source(pattern(root, 0))
    write_tar(root / "x-000.tar", [(f"{number}.png", picture(number)) for number in range(90, 110)])
    with pytest.raises(UnreadableImage, match="its shard changed since it was indexed"):
        source.read(0)


def test_a_shard_that_disappears_during_the_run_is_unreadable(write_shards):
    root = write_shards(1)
    source = open_source(pattern(root, 0))
    shutil.rmtree(root)
    with pytest.raises(UnreadableImage, match="the file is gone"):
        source.read(0)


# --- the pattern ---


def test_a_pattern_that_cannot_be_read_is_named():
    error = complaint("shards:x-{000..001.tar")
    assert error.problem == (
        "the pattern 'shards:x-{000..001.tar' cannot be read: Unbalanced braces: 'x-{000..001.tar'"
    )
    assert error.hint == "write shards:PATH/train-{000000..000127}.tar, a URL, or several with '::' between"


def test_a_pattern_that_cannot_be_read_keeps_its_secrets():
    assert "geheim" not in str(complaint("shards:https://me:geheim@host/x-{000..001.tar?sig=geheim"))


def test_a_variable_that_is_not_set_is_named():
    error = complaint("shards:${NOT_SET}/x.tar")
    assert (
        error.problem
        == "the environment variable WDS_NOT_SET is not set, and 'shards:${NOT_SET}/x.tar' stands on it"
    )
    assert error.hint == "webdataset puts its value in the place of ${NOT_SET}"


def test_an_empty_pattern_is_an_error():
    assert complaint("shards:").problem == "'shards:' names no shards"


def test_shards_have_no_test_split():
    assert not has_test_split("shards:x.tar")
    with pytest.raises(DataError, match=r"the shards 'shards:x\.tar' have no test split") as caught:
        open_source("shards:x.tar", split="test")
    assert caught.value.hint == "name a second pattern with the held-out shards"


def test_shards_are_listed():
    assert {entry["name"] for entry in list_datasets()} >= {"shards:PATTERN", "demo"}


def test_a_tar_file_without_the_scheme_is_told_the_scheme(write_shards):
    path = write_shards(1) / "x-000.tar"
    assert complaint(str(path)).hint == f"write shards:{path}"


def test_a_missing_webdataset_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    error = complaint("shards:x.tar")
    assert error.problem == "reading shards needs the package 'webdataset'"
    assert error.hint == "pip install 'edgecl[webdataset]'"


def test_a_webdataset_that_would_use_a_shell_is_refused(monkeypatch):
    monkeypatch.setattr(shards, "version", lambda _: "0.2.111")
    error = complaint("shards:x.tar")
    assert error.problem == "webdataset 0.2.111 is too old: it hands URLs to a shell"
    assert error.hint == "pip install --upgrade 'edgecl[webdataset]'"


def test_a_url_is_no_shell_command(server, tmp_path):
    for place in (server.url, "s3://bucket"):
        complaint(
            f"shards:{place}/x'$(touch {tmp_path}/ran)`touch {tmp_path}/ran`;touch '{tmp_path}/ran'.tar"
        )
    assert not (tmp_path / "ran").exists()


def test_an_absolute_uri_means_the_same_from_anywhere(write_shards, monkeypatch, tmp_path):
    write_shards(2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WDS_PLACE", "data")
    for uri in [
        "shards:data/x-{000..001}.tar",
        "shards:{data,./data}/x-000.tar::data/x-001.tar",
        "shards:${PLACE}",
    ]:
        absolute = absolute_uri(uri)
        assert f"{tmp_path}/data" in absolute
        before = open_source(uri).fingerprint
        monkeypatch.chdir("/")
        assert open_source(absolute).fingerprint == before
        monkeypatch.chdir(tmp_path)
    assert absolute_uri("shards:s3://bucket/x-{0..9}.tar") == "shards:s3://bucket/x-{0..9}.tar"


# --- over HTTP ---


class Server(ThreadingHTTPServer):
    """A real server of a folder that counts what it is asked and can misbehave."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked = []
        self.behave = "well"
        self.release = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        name = self.path.partition("?")[0].lstrip("/")
        server.asked.append(self.path)
        path = server.folder / name
        if server.behave == "forbid" or not path.is_file():
            self.send_error(403 if server.behave == "forbid" else 404)
            return
        content = path.read_bytes()
        announced = len(content)
        if server.behave == "break" or (server.behave == "break once" and len(server.asked) == 1):
            content = content[: announced // 2]
        if server.behave == "cut":
            content = content[: announced // 2]
            announced = len(content)
        self.send_response(200)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        if server.behave in ("stall", "wait"):
            self.wfile.write(content[:8192])
            self.wfile.flush()
            server.release.wait(20)
            content = content[8192:] if server.behave == "wait" else b""
        self.wfile.write(content)


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "data")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_shards_come_over_http_once_and_are_as_on_the_disk(write_shards, server, cache):
    root = write_shards(3)
    uri = f"shards:{server.url}/x-{{000..002}}.tar"
    source = open_source(uri)
    assert numbers(source) == list(range(12))
    assert source.fingerprint == open_source(pattern(root, 2)).fingerprint
    assert source.describe(4) == f"{server.url}/x-001.tar:000004.png"
    assert len(server.asked) == 3
    assert open_source(uri).fingerprint == source.fingerprint
    assert len(server.asked) == 3
    assert not list(cache.glob("*.part"))


def test_a_damaged_file_in_the_cache_is_fetched_again(write_shards, server, cache):
    write_shards(1)
    uri = f"shards:{server.url}/x-000.tar"
    open_source(uri)
    os.truncate(cached_place(uri.removeprefix("shards:")), 1000)
    assert numbers(open_source(uri)) == [0, 1, 2, 3]
    assert len(server.asked) == 2


def test_a_shard_the_server_has_not_is_named(write_shards, server):
    write_shards(1)
    assert str(complaint(f"shards:{server.url}/x-{{000..001}}.tar")) == (
        "the shard 'x-001.tar' could not be fetched: HTTP 404, there is no such file\n"
        f"  url:  {server.url}/x-001.tar\n"
        "  hint: compare the pattern's braces with what is there"
    )


def test_a_refused_login_says_where_a_login_belongs(write_shards, server):
    write_shards(1)
    server.behave = "forbid"
    error = complaint(f"shards:http://me:geheim@127.0.0.1:{server.server_port}/x-000.tar?Signature=streng")
    assert str(error) == (
        "the shard 'x-000.tar' could not be fetched: HTTP 403\n"
        f"  url:  {server.url}/x-000.tar\n"
        "  hint: the login or the signature is missing, wrong or out of date; records keep neither, so give the URL "
        "anew, or with ${NAME} and the secret in the environment variable WDS_NAME"
    )


def test_a_server_that_is_not_there_is_named(server):
    server.shutdown()
    server.server_close()
    error = complaint(f"shards:{server.url}/x.tar")
    assert error.problem == "the shard 'x.tar' could not be fetched: no connection: refused, or no way there"
    assert error.where == {"url": f"{server.url}/x.tar"}


def test_a_connection_that_breaks_is_tried_again(write_shards, server):
    write_shards(1)
    server.behave = "break once"
    assert numbers(open_source(f"shards:{server.url}/x-000.tar")) == [0, 1, 2, 3]
    assert len(server.asked) == 2


def test_a_length_that_disagrees_with_content_length_is_found(write_shards, server, cache):
    write_shards(1)
    server.behave = "break"
    error = complaint(f"shards:{server.url}/x-000.tar")
    assert error.problem == (
        "the shard 'x-000.tar' could not be fetched: the connection ended before the announced length "
        "(Content-Length) (3 tries)"
    )
    assert len(server.asked) == 3
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_shard_that_is_cut_on_the_server_is_not_kept(write_shards, server, cache):
    write_shards(1)
    server.behave = "cut"
    error = complaint(f"shards:{server.url}/x-000.tar")
    assert error.problem.startswith("the shard 'x-000.tar' is cut short: ")
    assert error.where["shard"] == f"{server.url}/x-000.tar"
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    server.behave = "well"
    assert numbers(open_source(f"shards:{server.url}/x-000.tar")) == [0, 1, 2, 3]


def test_a_server_that_falls_silent_is_given_up(write_shards, server, monkeypatch, cache):
    write_shards(1)
    server.behave = "stall"
    monkeypatch.setattr(fetching, "STALL_S", 0.5)
    error = complaint(f"shards:{server.url}/x-000.tar")
    assert str(error) == (
        "the shard 'x-000.tar' could not be fetched: not one byte came within 0 s\n"
        f"  url:  {server.url}/x-000.tar\n"
        "  hint: try again later; what is fetched stays"
    )
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def open_there(uri, answers):
    source = open_source(uri)
    answers.put((source.fingerprint, source.order(7, 0, np.arange(len(source))).tolist()))


def start_open(uri, answers):
    """Open shards in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=open_there, args=(uri, answers))
    with warnings.catch_warnings():
        # The server's thread goes on here alone; newer Pythons warn of it.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    return process


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("never happened")


def test_processes_that_want_the_same_shard_fetch_it_once_and_agree(write_shards, server):
    write_shards(1)
    server.behave = "wait"
    uri = f"shards:{server.url}/x-000.tar"
    answers = multiprocessing.get_context("fork").SimpleQueue()
    processes = [start_open(uri, answers) for _ in range(3)]
    wait_until(lambda: server.asked)
    # Time for the others to come to the lock.
    time.sleep(0.5)
    server.release.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    one, two, three = (answers.get() for _ in processes)
    assert one == two == three
    assert len(server.asked) == 1


def test_a_process_killed_while_fetching_leaves_nothing_in_the_way(write_shards, server, cache):
    write_shards(1)
    server.behave = "wait"
    uri = f"shards:{server.url}/x-000.tar"
    process = start_open(uri, None)
    wait_until(lambda: [path for path in cache.glob("*.part") if path.stat().st_size])
    process.kill()
    process.join()
    assert list(cache.glob("*.part"))
    server.release.set()
    server.behave = "well"
    assert numbers(open_source(uri)) == [0, 1, 2, 3]
    assert not list(cache.glob("*.part"))


def test_ctrl_c_ends_fetching_and_leaves_nothing_behind(write_shards, server, cache):
    write_shards(1)
    server.behave = "stall"
    process = start_open(f"shards:{server.url}/x-000.tar", None)
    wait_until(lambda: [path for path in cache.glob("*.part") if path.stat().st_size])
    os.kill(process.pid, signal.SIGINT)
    # The server stays silent for longer, and edgecl's own patience would be longer still.
    process.join(15)
    assert process.exitcode == 1
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_process_that_waits_for_one_that_gets_nowhere_gives_up(write_shards, server, cache, monkeypatch):
    write_shards(1)
    url = f"{server.url}/x-000.tar"
    lock = cached_place(url).with_name(f"{cached_place(url).name}.lock")
    cache.mkdir(parents=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, time; f = open({str(lock)!r}, 'ab'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    monkeypatch.setattr(fetching, "STALL_S", 0.25)
    error = complaint(f"shards:{url}")
    holder.kill()
    holder.communicate()
    assert error.problem == "another process fetches the shard 'x-000.tar' and got no further for 0 s"
    assert error.where == {"url": url, "lock": str(lock)}


def test_a_cache_that_cannot_be_written_is_named(write_shards, server, monkeypatch, tmp_path):
    write_shards(1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGECL_CACHE", str(tmp_path / "file"))
    error = complaint(f"shards:{server.url}/x-000.tar")
    assert error.problem == "the cache cannot be written: Not a directory"
    assert error.where["cache"] == tmp_path / "file" / "shards"
    assert error.hint.startswith("EDGECL_CACHE names another place")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named(write_shards, server, cache):
    write_shards(1)
    url = f"{server.url}/x-000.tar"
    cache.mkdir(parents=True)

    def full(place, who):
        part = place.with_name(f"{place.name}.{who}.part")
        part.symlink_to("/dev/full")
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "_part", full)
        error = complaint(f"shards:{url}")
    assert error.problem == "no room for the shard 'x-000.tar'"
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


# --- secrets ---


def test_a_signed_url_finds_its_shard_however_it_is_signed_and_recorded(write_shards, server, monkeypatch):
    write_shards(1)
    signed = (
        f"shards:http://me:geheim@127.0.0.1:{server.server_port}/x-000.tar?X-Amz-Expires=60&X-Amz-Signature="
    )
    source = open_source(signed + "streng")
    assert server.asked == ["/x-000.tar?X-Amz-Expires=60&X-Amz-Signature=streng"]
    recorded = absolute_uri(signed + "streng")
    assert recorded == source.uri == f"shards:{server.url}/x-000.tar"
    assert source.describe(0) == f"{server.url}/x-000.tar:000000.png"
    for uri in (signed + "anew", recorded):
        assert open_source(uri).fingerprint == source.fingerprint
    assert len(server.asked) == 1


def test_urls_that_differ_in_more_than_a_signature_are_different_shards():
    places = {
        cached_place(f"http://h/get?{query}")
        for query in ("shard=1", "shard=2", "shard=2&sig=x", "shard=2&sig=y")
    }
    assert len(places) == 2


def test_a_secret_in_the_environment_stays_out_of_the_record(write_shards, server, monkeypatch):
    write_shards(1)
    monkeypatch.setenv("WDS_SIGNATURE", "token=geheim")
    uri = f"shards:{server.url}/x-000.tar?${{SIGNATURE}}"
    assert open_source(uri).uri == uri
    assert server.asked == ["/x-000.tar?token=geheim"]
    assert absolute_uri(uri) == uri


# --- through other programs ---


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a real program of a given name first on the PATH."""

    def put(name, script):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return put


def test_s3_is_read_by_the_aws_program(write_shards, program, tmp_path):
    root = write_shards(2)
    program("aws", f'echo "$@" >> {tmp_path}/asked\ncat {root}/$(basename "$3")')
    source = open_source("shards:s3://bucket/train/x-{000..001}.tar")
    assert numbers(source) == list(range(8))
    assert sorted((tmp_path / "asked").read_text().splitlines()) == [
        "s3 cp s3://bucket/train/x-000.tar -",
        "s3 cp s3://bucket/train/x-001.tar -",
    ]


def test_what_aws_complains_about_is_shown(program):
    program("aws", "echo >&2; echo 'fatal error: An error occurred (404): Not Found' >&2; exit 1")
    assert str(complaint("shards:s3://bucket/x.tar")) == (
        "the shard 'x.tar' could not be fetched: its program ended with status 1\n"
        "  url:  s3://bucket/x.tar\n"
        "  said: fatal error: An error occurred (404): Not Found"
    )


def test_a_missing_program_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    error = complaint("shards:s3://bucket/x.tar")
    assert error.problem == "the shard 'x.tar' could not be fetched: the program 'aws' is not there"
    assert error.hint == "install aws, or put it on the PATH"


def test_an_unknown_kind_of_url_is_named():
    error = complaint("shards:gopher://host/x.tar")
    assert error.problem == (
        "the shard 'x.tar' could not be fetched: gopher://host/x.tar: no gopen handler defined"
    )


def test_a_pipe_runs_only_where_it_is_allowed(write_shards, monkeypatch, tmp_path):
    root = write_shards(1)
    uri = f"shards:pipe:touch {tmp_path}/ran; cat {root}/x-000.tar"
    error = complaint(uri)
    assert error.problem == "a pipe runs a program, so it must be allowed first: 'pipe:touch …'"
    assert error.hint == "if this is your own command, set EDGECL_SHARD_PIPES=1"
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("EDGECL_SHARD_PIPES", "1")
    assert numbers(open_source(uri)) == [0, 1, 2, 3]
    assert (tmp_path / "ran").exists()
    recorded = absolute_uri(uri)
    assert recorded == "shards:pipe:touch …"
    assert complaint(recorded).problem == "the command of 'pipe:touch …' was not kept in the record"


def test_the_cache_holds_what_the_server_has(write_shards, server):
    root = write_shards(1)
    url = f"{server.url}/x-000.tar"
    open_source(f"shards:{url}")
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (cached_place(url), root / "x-000.tar")
    ]
    assert digests[0] == digests[1]
