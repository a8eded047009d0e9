"""The index of a folder: quick where nothing changed, and never a picture too many or too few."""

import hashlib
import json
import os
import shutil
import socket
import stat

import pytest

from edgecl.data import index
from edgecl.data.index import list_folder, scan
from edgecl.data.loading import TrainingImages
from edgecl.data.sources import open_source
from edgecl.errors import DataError


def age(root):
    """Set the times of change of all folders back: a folder that changes just now is not indexed."""
    for folder, _, _ in os.walk(root, topdown=False):
        os.utime(folder, (1_600_000_000, 1_600_000_000))


@pytest.fixture
def scans(monkeypatch):
    """Roots that were read whole."""
    seen = []

    def record(root):
        seen.append(root)
        return scan(root)

    monkeypatch.setattr(index, "scan", record)
    return seen


@pytest.fixture
def folder(write_images, tmp_path):
    """Two classes of three pictures, indexed once."""
    root = write_images(6, classes=("a", "b/deep"))
    age(root)
    list_folder(root, index_dir=tmp_path / ".edgecl")
    return root


def listed(root, tmp_path):
    listing, _ = list_folder(root, index_dir=tmp_path / ".edgecl")
    fresh = scan(root)
    assert listing.names == fresh.names
    assert listing.sizes.tolist() == fresh.sizes.tolist()
    assert listing.fingerprint == fresh.fingerprint
    return listing


def test_an_unchanged_folder_is_not_read_again(folder, tmp_path, scans):
    names = listed(folder, tmp_path).names
    assert scans == []
    assert names == [*(f"a/00{one}.png" for one in (0, 2, 4)), *(f"b/deep/00{one}.png" for one in (1, 3, 5))]


def add_elsewhere(root):
    (root / "c").mkdir()
    (root / "c" / "000.png").write_bytes(b"x")


def replace_by_another_size(root):
    (root / "a" / "new").write_bytes(b"xyz")
    (root / "a" / "new").replace(root / "a" / "002.png")


def replace_a_folder(root):
    (root / "a").rename(root / "b" / "a")
    (root / "b" / "a" / "002.png").unlink()
    (root / "a").mkdir()
    (root / "a" / "000.png").write_bytes(b"x")
    age(root / "a")
    os.utime(root, (1_600_000_000, 1_600_000_000))


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "b/deep/009.png").write_bytes(b"added"),
        lambda root: (root / "a/002.png").unlink(),
        lambda root: (root / "a/002.png").rename(root / "a/003.png"),
        lambda root: (root / "a/002.png").write_bytes(b"another size, in place"),
        add_elsewhere,
        replace_by_another_size,
        replace_a_folder,
    ],
)
def test_a_change_is_noticed(folder, tmp_path, scans, change):
    change(folder)
    listed(folder, tmp_path)
    assert scans == [folder]


def test_a_change_within_a_linked_folder_is_noticed(write_images, tmp_path, scans):
    root, other = write_images(2, classes=("a",)), write_images(2, folder="elsewhere")
    (root / "b").symlink_to(other, target_is_directory=True)
    age(root)
    age(other)
    listed(root, tmp_path)
    listed(root, tmp_path)
    assert scans == [root]
    (other / "001.png").unlink()
    assert listed(root, tmp_path).names == ["a/000.png", "a/001.png", "b/000.png"]
    assert scans == [root, root]


def test_a_folder_that_changes_just_now_is_not_indexed(write_images, tmp_path, scans):
    root = write_images(2)
    listed(root, tmp_path)
    listed(root, tmp_path)
    assert scans == [root, root]


def test_a_large_folder_is_held_to_a_sample(write_images, tmp_path, scans, monkeypatch):
    monkeypatch.setattr(index, "_SAMPLE", 10)
    root = write_images(40)
    age(root)
    listed(root, tmp_path)
    for path in root.iterdir():
        path.write_bytes(b"smaller")
    age(root)
    listed(root, tmp_path)
    assert len(scans) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other"])
def test_a_damaged_index_is_made_again(folder, tmp_path, scans, damage):
    (file,) = (tmp_path / ".edgecl").iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    file.write_bytes({"empty": b"", "cut": whole[:-9], "flipped": bytes(flipped), "other": b"{}\n"}[damage])
    listed(folder, tmp_path)
    listed(folder, tmp_path)
    assert scans == [folder]
    assert file.read_bytes() == whole


def resealed(content, change):
    """An index with another body and the sum that fits it."""
    first, _, body = content.partition(b"\n")
    header, _, rest = body.partition(b"\n")
    fields = json.loads(header)
    names, sizes = rest[: fields["names_bytes"]], rest[fields["names_bytes"] :]
    fields, names, sizes = change(fields, names, sizes) or (fields, names, sizes)
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode() + b"\n" + names + sizes
    return first.rpartition(b" ")[0] + b" " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


FORGED = {
    "nested deep": lambda fields, names, sizes: (b"[" * 100_000 + b"\n", b"", b""),
    "a list": lambda fields, names, sizes: (b"[1, 2]\n", b"", b""),
    "none of its folders": lambda fields, names, sizes: fields["folders"].clear(),
    "a folder's time a text": lambda fields, names, sizes: fields["folders"][0].__setitem__(1, "now"),
    "a fingerprint of another type": lambda fields, names, sizes: fields.update(fingerprint=[1]),
    "links that are a text": lambda fields, names, sizes: fields.update(left_out="abc"),
    "a name too few": lambda fields, names, sizes: (
        fields | {"names_bytes": len(names.rpartition(b"\0")[0])},
        names.rpartition(b"\0")[0],
        sizes,
    ),
    "half a size": lambda fields, names, sizes: (fields, names, sizes[:-4]),
    "a size below zero": lambda fields, names, sizes: (fields, names, b"\xff" * len(sizes)),
    "names out of order": lambda fields, names, sizes: (
        fields,
        b"\0".join(reversed(names.split(b"\0"))),
        sizes,
    ),
    "a name that leads out": lambda fields, names, sizes: (fields, b"../" + names[3:], sizes),
    "a name from the root": lambda fields, names, sizes: (fields, b"/" + names[1:], sizes),
}


@pytest.mark.parametrize("forgery", FORGED.values(), ids=FORGED)
def test_an_index_with_a_wrong_body_and_the_sum_of_it_is_made_again(folder, tmp_path, scans, forgery):
    (file,) = (tmp_path / ".edgecl").iterdir()
    whole = file.read_bytes()
    file.write_bytes(resealed(whole, forgery))
    assert file.read_bytes() != whole
    listed(folder, tmp_path)
    listed(folder, tmp_path)
    assert scans == [folder]
    assert file.read_bytes() == whole


def test_a_resealed_index_that_is_whole_counts(folder, tmp_path, scans):
    (file,) = (tmp_path / ".edgecl").iterdir()
    file.write_bytes(resealed(file.read_bytes(), lambda fields, names, sizes: None))
    listed(folder, tmp_path)
    assert scans == []


def test_a_pipe_in_the_place_of_an_index_is_not_waited_for(folder, tmp_path, scans):
    (file,) = (tmp_path / ".edgecl").iterdir()
    file.unlink()
    os.mkfifo(file)
    listed(folder, tmp_path)
    assert scans == [folder]


def test_what_goes_during_the_scan_is_left_out(write_images, monkeypatch):
    root = write_images(9, classes=("a", "b", "c"))
    really = os.scandir

    def going(place):
        # Folders are read from the end of the alphabet; once c is read, a is gone and b has lost a picture.
        if str(place).endswith("/c"):
            shutil.rmtree(root / "a")
        return really(place)

    monkeypatch.setattr(os, "scandir", going)
    assert [name.partition("/")[0] for name in scan(root).names] == ["b"] * 3 + ["c"] * 3


def test_a_root_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        scan(tmp_path / "gone")


def test_names_of_every_kind_survive(tmp_path, scans):
    root = tmp_path / "images"
    root.mkdir()
    for name in ("new\nline.png", "ünï.png", os.fsdecode(b"latin-\xe9.png")):
        (root / name).write_bytes(b"x")
    age(root)
    assert listed(root, tmp_path).names == listed(root, tmp_path).names
    assert len(scans) == 1


def test_an_index_that_cannot_be_kept_costs_nothing_else(write_images, tmp_path, capsys):
    root = write_images(2)
    age(root)
    (tmp_path / ".edgecl").write_text("a file in the way")
    listing, _ = list_folder(root, index_dir=tmp_path / ".edgecl")
    assert len(listing.names) == 2
    assert capsys.readouterr().err.startswith("edgecl: no index is kept, the next start takes as long: ")


def test_of_many_processes_the_first_keeps_the_index(write_images, tmp_path, monkeypatch):
    root = write_images(2)
    age(root)
    for name, value in {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    listed(root, tmp_path)
    assert not (tmp_path / ".edgecl").exists()
    monkeypatch.setenv("RANK", "0")
    listed(root, tmp_path)
    assert len([*(tmp_path / ".edgecl").iterdir()]) == 1


# --- links that lead in circles ---


def test_links_that_lead_back_are_left_out_and_named(write_images, capsys):
    root = write_images(4, classes=("a", "b"))
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    (root / "again").symlink_to(root / "b", target_is_directory=True)
    assert len(open_source(str(root))) == 4
    assert "2 links" in (said := capsys.readouterr().err)
    assert "a/loop, again" in said


@pytest.mark.parametrize("name", ["x.png", "folder"])
def test_a_link_to_itself_is_left_out_and_named(write_images, capsys, name):
    root = write_images(2)
    (root / name).symlink_to(root / name)
    assert len(open_source(str(root))) == 2
    assert f"1 link in '{root}' left out" in (said := capsys.readouterr().err)
    assert said.endswith(f": {name}\n")


def test_a_folder_that_may_not_be_read_is_named(write_images):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    root = write_images(2, classes=("a", "b"))
    (root / "a").chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            open_source(str(root))
    finally:
        (root / "a").chmod(stat.S_IRWXU)


# --- what there is no file behind ---


@pytest.fixture
def no_files(write_images, tmp_path, monkeypatch):
    """Four pictures in two classes, and among them much that is none."""
    root = write_images(4, classes=("a", "b"))
    os.mkfifo(root / "a" / "pipe.jpg")
    (root / "a" / "way.jpg").symlink_to(root / "a" / "pipe.jpg")
    (root / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "b" / "below.jpg").symlink_to(root / "a" / "000.png" / "x.jpg")
    (root / "c").symlink_to(tmp_path / "not mounted", target_is_directory=True)
    monkeypatch.chdir(root / "b")  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as talker:
        talker.bind("talk.png")
    # Of no interest: neither pictures nor links that might have led to some.
    os.mkfifo(root / "queue")
    (root / "notes.txt").write_text("x")
    (root / "more.txt").symlink_to(root / "notes.txt")
    age(root)
    return root


SAID = (
    "edgecl: 6 names in '{}' left out, with no file behind: a/pipe.jpg (a named pipe), a/way.jpg (a named pipe), "
    "b/below.jpg (a link that leads nowhere), b/gone.jpg (a link that leads nowhere), b/talk.png (a socket) …\n"
)


def test_what_is_no_file_is_no_picture_and_is_said_from_the_index_too(no_files, tmp_path, capsys, scans):
    for _ in range(2):
        listing, _ = list_folder(no_files, index_dir=tmp_path / ".edgecl")
        assert listing.names == ["a/000.png", "a/002.png", "b/001.png", "b/003.png"]
        assert capsys.readouterr().err == SAID.format(no_files)
    assert scans == [no_files]


def test_a_link_that_leads_somewhere_again_is_noticed(no_files, tmp_path, scans):
    assert len(listed(no_files, tmp_path).names) == 4
    (tmp_path / "nowhere.jpg").write_bytes(b"x")
    assert "b/gone.jpg" in listed(no_files, tmp_path).names
    (tmp_path / "not mounted").mkdir()
    (tmp_path / "not mounted" / "0.jpg").write_bytes(b"x")
    assert "c/0.jpg" in listed(no_files, tmp_path).names
    assert len(scans) == 3


# --- files that could not be decoded ---


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files whose bytes were read."""
    from edgecl.data.source import ImageSource

    seen = []
    real = ImageSource.read_bytes

    def record(self, position):
        seen.append(self.describe(position).rpartition("/")[2])
        return real(self, position)

    monkeypatch.setattr(ImageSource, "read_bytes", record)
    return seen


def train(root, tmp_path, cache_mib):
    source = open_source(str(root), index_dir=tmp_path / ".edgecl")
    data = TrainingImages(source, decode_size=8, cache_mib=cache_mib, workers=1, max_bad_fraction=0.5)
    batches = [
        (batch.indices.tolist(), batch.images.tolist()) for batch in data.batches(3, 0, batch_size=len(data))
    ]
    return batches, data.skipped


@pytest.mark.parametrize("cache_mib", [0, 64])
def test_a_file_known_to_be_unreadable_is_not_met_again_and_changes_no_order(
    write_images, tmp_path, decoded, cache_mib
):
    root = write_images(8)
    (root / "003.png").write_bytes(b"no image")
    (root / "005.png").write_bytes(b"")
    age(root)
    first = train(root, tmp_path, cache_mib)
    assert "003.png" in decoded
    decoded.clear()
    assert train(root, tmp_path, cache_mib) == first
    assert first[1] == (str(root / "003.png"), str(root / "005.png"))
    assert decoded
    assert not {"003.png", "005.png"} & set(decoded)


def test_a_repaired_file_is_read_again(write_images, tmp_path):
    root = write_images(8)
    whole = (root / "003.png").read_bytes()
    (root / "003.png").write_bytes(b"x" * len(whole))
    age(root)
    assert len(train(root, tmp_path, 64)[1]) == 1
    (root / "003.png").write_bytes(whole)
    os.utime(root / "003.png", (1_700_000_000, 1_700_000_000))
    assert train(root, tmp_path, 64)[1] == ()


def test_a_file_that_was_gone_is_not_remembered(write_images, tmp_path):
    root = write_images(8)
    source = open_source(str(root), index_dir=tmp_path / ".edgecl")
    (root / "003.png").rename(tmp_path / "away.png")
    data = TrainingImages(source, decode_size=8, max_bad_fraction=0.5)
    assert data.skipped == (str(root / "003.png"),)
    (tmp_path / "away.png").rename(root / "003.png")
    assert train(root, tmp_path, 64)[1] == ()


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b'{"000.png": 1}', b'{"000.png": "abc"}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_memory_is_none(write_images, tmp_path, content):
    root = write_images(3)
    _, memory = list_folder(root, index_dir=tmp_path / ".edgecl")
    memory.remember({1: "broken"})
    assert memory.known() == {1: "broken"}
    (file,) = (tmp_path / ".edgecl").glob("unreadable-*.json")
    file.write_bytes(content)
    assert memory.known() == {}
