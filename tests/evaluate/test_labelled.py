"""Labelled images: what is learned from, what is held out, and draws of few labels."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from conftest import write_folder

from edgecl.errors import DataError
from edgecl.evaluate.labelled import draw_few, read_labelled
from edgecl.storage.records import Preprocessing

PREPROCESSING = Preprocessing(image_size=16, resize_size=16, mean=[0.5] * 3, std=[0.25] * 3)


def read(data, **options):
    return read_labelled(str(data), **{"test": None, "preprocessing": PREPROCESSING, **options})


def pictures(part):
    return {picture.numpy().tobytes() for picture in part.images}


def test_a_fifth_of_each_class_is_held_out_and_labels_belong_to_their_pictures(image_folder):
    """Blue, green and red pictures: the strongest channel says the class."""
    labelled = read(image_folder)
    assert torch.bincount(labelled.train.labels).tolist() == [16, 16, 16]
    assert torch.bincount(labelled.test.labels).tolist() == [4, 4, 4]
    assert len(pictures(labelled.train) | pictures(labelled.test)) == 60  # none on both sides
    assert labelled.classes == ("blue", "green", "red")
    for part in (labelled.train, labelled.test):
        assert torch.equal(2 - part.images.float().mean((2, 3)).argmax(1), part.labels)


def test_limit_leaves_the_held_out_part_whole(image_folder):
    whole, limited = read(image_folder), read(image_folder, limit=9)
    assert torch.bincount(limited.train.labels).tolist() == [3, 3, 3]
    assert torch.equal(limited.test.images, whole.test.images)


def test_test_folder_is_used_whole_and_alone(image_folder, tmp_path):
    other = write_folder(tmp_path / "other", per_class=3)
    labelled = read(image_folder, test=str(other))
    assert (len(labelled.train), len(labelled.test)) == (60, 9)
    assert (labelled.train_from, labelled.test_from) == (str(image_folder), str(other))


def test_test_folder_with_other_classes_is_refused_naming_both(image_folder, tmp_path):
    other = write_folder(tmp_path / "other", per_class=2, classes={"blue": (0, 0, 200), "pink": (200, 0, 99)})
    with pytest.raises(DataError) as caught:
        read(image_folder, test=str(other))
    assert "other classes: blue, pink against blue, green, red" in caught.value.problem
    assert caught.value.where == {"data": str(image_folder), "test": str(other)}
    assert "same names on both sides" in caught.value.hint


def test_held_out_pictures_that_are_learned_from_are_refused_or_named(image_folder, tmp_path, capsys):
    other = shutil.copytree(image_folder, tmp_path / "other")
    table = tmp_path / "table.csv"
    table.write_text(
        "file,label\n" + "".join(f"{path},{path.parent.name}\n" for path in other.rglob("*.png"))
    )
    for data, test in ((image_folder, other), (f"csv:{table}", f"csv:{table}")):
        with pytest.raises(DataError, match=r"every held-out image .*learn"):
            read(data, test=str(test))
    for path in other.rglob("*.png"):
        if path.stem != "001":
            path.write_bytes(path.read_bytes() + b"changed")
    assert len(read(image_folder, test=str(other)).test) == 60
    assert "LEAK: 3 of 60 held-out images" in capsys.readouterr().err


def test_folder_without_labels_is_refused(unlabelled_folder):
    with pytest.raises(DataError) as caught:
        read(unlabelled_folder)
    assert "no labels" in caught.value.problem
    assert caught.value.where == {"data": str(unlabelled_folder)}
    assert "each class in a folder" in caught.value.hint


def test_unreadable_picture_keeps_the_others_with_their_labels(image_folder, tmp_path):
    folder = shutil.copytree(image_folder, tmp_path / "copy")
    (folder / "green" / "005.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 60 images cannot be read") as caught:
        read(folder)
    assert "repair" in caught.value.hint
    assert "raise" not in caught.value.hint, "no recipe is here to allow more"
    labelled = read(folder, max_bad_fraction=0.1)
    assert len(labelled.train) + len(labelled.test) == 59
    for part in (labelled.train, labelled.test):
        assert torch.equal(2 - part.images.float().mean((2, 3)).argmax(1), part.labels)


# --- draws ---

LABELS = torch.from_numpy(np.random.default_rng(0).integers(0, 4, 200))


def test_draws_hold_so_many_of_each_class_and_differ():
    assert torch.bincount(LABELS[draw_few(LABELS, per_class=7, draw=0)]).tolist() == [7, 7, 7, 7]
    draws = {tuple(sorted(draw_few(LABELS, per_class=5, draw=draw).tolist())) for draw in range(10)}
    assert len(draws) == 10


def test_draws_together_reach_most_images():
    """Were they near copies of each other, an interval over draws would mean nothing."""
    reached = {index for draw in range(40) for index in draw_few(LABELS, per_class=10, draw=draw).tolist()}
    assert len(reached) > 0.95 * len(LABELS)


def test_class_with_too_few_images_is_named_with_both_numbers():
    labels = torch.tensor([0, 0, 0, 1, 1])
    with pytest.raises(DataError) as caught:
        draw_few(labels, per_class=3, draw=0)
    assert "class 1 has 2 images" in caught.value.problem
    assert "fewer than the 3" in caught.value.problem
    assert "--labels-per-class" in caught.value.hint
