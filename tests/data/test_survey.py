"""What is seen of a folder: planted duplicates, leaks, unreadable files; a hash against a cosine transform written out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from edgecl.data import survey as module
from edgecl.data.sources import open_source
from edgecl.data.survey import MOST_READ, copies, groups_alike, perceptual_hash, sample, survey


def scene(seed, side=(96, 64)):
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(side, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Forty scenes, of which three are there again in other forms and two are labelled; and two files that are none."""
    root = tmp_path_factory.mktemp("survey")
    photos, labelled = root / "photos", root / "labelled"
    photos.mkdir()
    for index in range(40):
        scene(index).save(photos / f"{index:02}.png")
    scene(3).save(photos / "again-as.jpg", quality=50)
    ImageEnhance.Brightness(scene(3)).enhance(1.2).save(photos / "again-brighter.png")
    scene(7).resize((48, 32)).save(photos / "again-half.png")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (photos / "empty.png").touch()
    for name, seeds in {"cat": (11, 100, 101), "dog": (12, 102)}.items():
        (labelled / name).mkdir(parents=True)
        for seed in seeds:
            scene(seed).save(labelled / name / f"{seed}.jpg", quality=60)
    return photos, labelled


def test_planted_duplicates_leaks_and_unreadable_files_are_found_and_nothing_else(folders):
    photos, labelled = folders
    found = survey(open_source(str(photos)), open_source(str(labelled)))
    assert (found.images, found.read, found.labelled) == (45, 43, 5)
    assert {path.rpartition("/")[2] for path in found.unreadable} == {"broken.jpg", "empty.png"}
    groups = {frozenset(path.rpartition("/")[2] for path in group) for group in found.duplicates}
    assert groups == {
        frozenset({"03.png", "again-as.jpg", "again-brighter.png"}),
        frozenset({"07.png", "again-half.png"}),
    }
    assert [[path.rpartition("/")[2] for path in pair] for pair in found.leaks] == [
        ["11.png", "11.jpg"],
        ["12.png", "12.jpg"],
    ]


def test_copies_are_found_among_those_that_are_not_looked_at_and_the_share_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_READ", 20)
    photos, labelled = tmp_path / "photos", tmp_path / "labelled"
    photos.mkdir()
    labelled.mkdir()
    for index in range(200):
        scene(index, (24, 16)).save(photos / f"{index:03}.bmp")  # all of one size
    for index in (3, 77, 140):
        shutil.copy(photos / f"{index:03}.bmp", labelled)
    scene(900, (24, 16)).save(labelled / "other.bmp")
    for folder in (photos, labelled):
        (folder / "empty.bmp").touch()
    ours, theirs = open_source(str(photos)), open_source(str(labelled))
    found = survey(ours, theirs)
    assert [pair[0].rpartition("/")[2] for pair in found.leaks] == ["003.bmp", "077.bmp", "140.bmp"]
    assert (found.images, found.searched, found.read) == (201, 201, 20)
    # No more may be read than fifty: every fourth, and the one whose size none has.
    monkeypatch.setattr(module, "_MOST_BYTES", 60 * (module._OPENING + 1206))
    same, searched = copies(ours, theirs)
    assert searched == 51
    assert [ours.describe(here).rpartition("/")[2] for here in same.values()] == ["140.bmp"]


def test_sides_and_ratios_are_those_of_the_files(folders):
    found = survey(open_source(str(folders[0])))
    assert found.shorter_side[1:] == [64, 64]
    assert found.aspect == [1.5, 1.5, 1.5]
    assert found.grayscale == 0.0
    assert found.smallest_class is None


def test_pictures_without_color_are_counted(tmp_path):
    for index in range(4):
        image = scene(index)
        (image if index == 0 else image.convert("L")).save(tmp_path / f"{index}.png")
    assert survey(open_source(str(tmp_path))).grayscale == 0.75


def test_hash_is_which_low_frequencies_are_above_their_median():
    pixels = torch.from_numpy(np.asarray(scene(1, (32, 32))).transpose(2, 0, 1).copy())
    gray = pixels.double().mean(0).numpy()
    spectrum = [
        sum(
            gray[y, x] * np.cos(np.pi * u * (2 * y + 1) / 64) * np.cos(np.pi * v * (2 * x + 1) / 64)
            for y in range(32)
            for x in range(32)
        )
        for u in range(11)
        for v in range(11)
    ][1:]
    (bits,) = perceptual_hash(pixels[None]).tolist()
    expected = np.where(spectrum > np.sort(spectrum)[59], 1.0, -1.0)  # the lower of the two in the middle
    assert bits == expected.tolist()
    assert sum(bits) == 0  # as many above the median as below


def test_groups_go_on_from_the_first_picture():
    """Pictures that look like the second of a group belong to it."""
    hashes = torch.ones(4, 120)
    hashes[1, :15] = -1
    hashes[2, :30] = -1  # 30 bits from the first, 15 from the second
    hashes[3, ::2] = -1
    assert groups_alike(hashes) == [[0, 1, 2]]


def test_of_many_pictures_runs_of_neighbors_are_read_from_end_to_end():
    assert sample(MOST_READ).tolist() == list(range(MOST_READ))
    chosen = sample(1_000_000)
    assert len(chosen) == MOST_READ
    assert (chosen[0], chosen[-1]) == (0, 999_999)
    gaps = np.diff(chosen)
    assert (gaps == 1).sum() == MOST_READ * 19 // 20  # runs of twenty
    assert gaps.max() < 2 * 1_000_000 / 250


_SURVEY = """
import resource, sys
from edgecl.data.sources import open_source
from edgecl.data.survey import survey
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = survey(open_source(sys.argv[1]))
assert (found.images, found.read) == (1_000_000, 5_000), found
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_a_million_pictures_take_less_than_a_gigabyte(tmp_path):
    for folder in range(100):
        (tmp_path / f"{folder:02}").mkdir()
        for index in range(10_000):
            os.symlink("../.picture.png", tmp_path / f"{folder:02}" / f"{index:05}.png")  # noqa: PTH211 - quicker
    scene(0).save(tmp_path / ".picture.png")
    done = subprocess.run(
        [sys.executable, "-c", _SURVEY, tmp_path], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2**20
