"""What is in one shard: which members are images and labels, the index that is kept, and what is wrong with a shard."""

import gzip
import os
import tarfile

import numpy as np
import pytest

pytest.importorskip("webdataset")

from edgecl.data.sources import open_source

from .tar_shards import exc, numbers, pattern, picture, write_tar

pytestmark = pytest.mark.usefixtures("cache")


# --- its members ---


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


def test_a_truncated_shard_says_how_much_of_it_is_whole(write_shards):
    path = write_shards(1) / "x-000.tar"
    with tarfile.open(path) as archive:
        member = archive.getmember("000002.png")
    os.truncate(path, member.offset_data + 10)
    expected = member.offset_data + -(-member.size // 512) * 512
    error = exc(f"shards:{path}")
    assert "cut short" in error.problem
    assert "inside '000002.png', after 2 whole" in error.problem
    assert error.where["bytes"] == f"{member.offset_data + 10:,}, at least {expected:,} expected"


@pytest.mark.parametrize("more", [0, 100])
def test_a_shard_cut_between_members_lacks_its_end_mark(write_shards, more):
    path = write_shards(1) / "x-000.tar"
    with tarfile.open(path) as archive:
        os.truncate(path, archive.getmember("000003.png").offset + more)
    error = exc(f"shards:{path}")
    # The fourth sample's other members come before its picture, so three are whole.
    assert "after 3 whole" in error.problem
    assert "end mark is missing" in error.problem


def test_a_shard_damaged_in_its_middle_is_found(write_shards):
    path = write_shards(1) / "x-000.tar"
    with tarfile.open(path) as archive:
        start = archive.getmember("000002.png").offset
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 512)
    problem = exc(f"shards:{path}").problem
    assert f"damaged at byte {start:,}" in problem
    assert "no tar header" in problem
    assert "after 2 whole" in problem


def test_a_shard_cut_inside_a_header_is_cut_short(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", picture(0)), ("ü" * 150 + ".png", picture(1))])
    with tarfile.open(path) as archive:
        long = archive.getmembers()[1]
    os.truncate(path, long.offset_data - 512)
    assert "inside a header" in exc(f"shards:{path}").problem


def test_a_damaged_long_name_is_no_cut(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", picture(0)), ("ü" * 150 + ".png", picture(1))])
    with tarfile.open(path) as archive:
        long = archive.getmembers()[1]
    with path.open("r+b") as file:
        file.seek(long.offset_data - 512)
        file.write(b"\xff" * 512)
    assert "damaged: bad checksum" in exc(f"shards:{path}").problem


@pytest.mark.parametrize("kind", [b"L", b"K", b"x"])
def test_long_names_of_long_names_are_damage(tmp_path, kind):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, 512
    block = header.tobuf(tarfile.GNU_FORMAT) + b"a" * 512
    path = tmp_path / "x.tar"
    path.write_bytes(block * 5000 + bytes(1024))
    assert "is damaged" in exc(f"shards:{path}").problem


def test_joined_tar_files_are_not_read_halfway(write_shards, tmp_path):
    root = write_shards(2)
    joined = tmp_path / "joined.tar"
    joined.write_bytes((root / "x-000.tar").read_bytes() + (root / "x-001.tar").read_bytes())
    error = exc(f"shards:{joined}")
    assert "after its end mark, after 4 whole" in error.problem
    assert "'::'" in error.hint


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (gzip.compress(bytes(10240), mtime=0), "is compressed"),
        (b"<html>404</html>" * 100, "not a tar"),
        (bytes(10240), "no images"),
    ],
)
def test_what_is_no_shard_is_named(tmp_path, content, word):
    (tmp_path / "x.tar").write_bytes(content)
    error = exc(f"shards:{tmp_path}/x.tar")
    assert word in error.problem
    assert "x.tar" in error.problem
    assert error.hint


def test_a_pipe_in_the_place_of_a_shard_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    assert "is no file" in exc(f"shards:{tmp_path}/x.tar").problem


def test_a_shard_nobody_may_read_is_named(write_shards):
    path = write_shards(1) / "x-000.tar"
    path.unlink()
    path.symlink_to(path.name)
    # A loop of links counts as missing, a folder of that name as a folder without shards.
    assert f"no shard '{path}'" in exc(f"shards:{path}").problem
    path.unlink()
    path.mkdir()
    problem = exc(f"shards:{path}").problem
    assert "no .tar files" in problem
    assert f"folder '{path}'" in problem


def link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        ("../../etc/cron.d/a.png", "climbs out of the shard: '../../etc/cron.d/a.png'"),
        ("/etc/a.png", "climbs out of the shard: '/etc/a.png'"),
        ("../\x1b[2J.txt", "climbs out of the shard: '../\\x1b[2J.txt'"),
        (link("a.png", "/etc/passwd", tarfile.SYMTYPE), "is a symbolic link: 'a.png'"),
        (link("b.png", "a.png", tarfile.LNKTYPE), "is a hard link: 'b.png'"),
        (link("sda.png", "", tarfile.BLKTYPE), "is a device: 'sda.png'"),
        (link("tty.png", "", tarfile.CHRTYPE), "is a device: 'tty.png'"),
        (link("queue.png", "", tarfile.FIFOTYPE), "is a named pipe: 'queue.png'"),
    ],
)
def test_a_member_that_has_no_place_in_a_shard_is_refused(tmp_path, member, problem, cache):
    path = write_tar(tmp_path / "x.tar", [("0.png", picture(0)), (member, picture(1))])
    error = exc(f"shards:{path}")
    assert problem in error.problem
    assert error.where == {"shard": str(path)}
    # Nothing is kept of it, and nothing was unpacked.
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()) == [
        "x.tar"
    ]


def test_the_same_member_twice_is_refused(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", [("a.png", picture(0)), ("b.png", picture(1)), ("a.png", picture(2))]
    )
    assert "'x.tar' holds 'a.png' twice" in exc(f"shards:{path}").problem


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a\0b", b"long" * 500])
def test_a_label_that_is_no_short_text_is_refused(tmp_path, content):
    path = write_tar(tmp_path / "x.tar", [("a.png", picture(0)), ("a.cls", content)])
    assert "'a.cls', which is no short text" in exc(f"shards:{path}").problem
