"""Pictures named by a CSV file: one class each, or a set of classes each."""

from __future__ import annotations

import numpy as np
import pytest

from edgecl.data.sources import absolute_uri, open_source
from edgecl.errors import DataError


@pytest.fixture
def table(tmp_path, image_folder):
    def table(text, name="labels.csv"):
        file = image_folder.parent / f"{tmp_path.name}-{name}"
        file.write_text(text, encoding="utf-8")
        return f"csv:{file}"

    return table


def test_a_class_each(table, image_folder):
    source = open_source(
        table("file,label,by\ncolors/red/000.png,scarlet,me\ncolors/blue/001.png, navy ,you\n")
    )
    assert source.classes == ("navy", "scarlet")
    assert source.labels.tolist() == [1, 0]
    assert source.label_sets is None
    assert source.read(0).size == (32, 32)
    assert source.describe(1) == str(image_folder / "blue" / "001.png")


def test_a_set_of_classes_each_none_among_them(table):
    rows = ["colors/red/000.png,warm; bright", "colors/blue/001.png,cold;", "colors/green/002.png,"]
    source = open_source(table("\n".join(["\ufefffile,labels", *rows])))
    assert source.classes == ("bright", "cold", "warm")
    assert source.labels is None
    assert source.label_sets.tolist() == [[True, False, True], [False, True, False], [False] * 3]
    taken = source.take(np.array([2, 0]))
    assert taken.label_sets.tolist() == [[False] * 3, [True, False, True]]
    assert taken.strata.tolist() == [0, 2]


def test_another_label_is_another_fingerprint(table):
    first, second = (open_source(table(f"file,label\ncolors/red/000.png,{name}")) for name in "ab")
    assert first.fingerprint != second.fingerprint


def test_the_uri_means_the_same_from_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("csv:a/labels.csv") == f"csv:{tmp_path}/a/labels.csv"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "columns none"),
        ("name,label\na,b", "columns name, label"),
        ("file,label\n", "names no picture"),
        ("file,label\na.png,", "'a.png' has no class"),
        ("file,labels\na.png,\n", "no picture has a class"),
        ("file,label\na.png,x\na.png,y", "1 file twice"),
        ("file,label\n,x", "a row without a file"),
        ('file,label\na.png,"x', "not a CSV file"),
    ],
)
def test_what_is_no_table_is_a_named_error(table, text, words):
    with pytest.raises(DataError, match=words):
        open_source(table(text))


def test_a_missing_table_is_a_named_error(tmp_path):
    with pytest.raises(DataError, match="no table"):
        open_source(f"csv:{tmp_path / 'none.csv'}")
