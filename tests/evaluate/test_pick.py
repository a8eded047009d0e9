"""`edgecl pick`: typical pictures of every class, no picture twice, odd ones named; a list and a page that agree."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_folder
from PIL import Image

import edgecl as package
from edgecl.errors import ArtifactError, DataError
from edgecl.evaluate import pick as module
from edgecl.storage.records import PickedImage


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three colors of twenty, four copies of one of them, one of another kind, one broken, one with a hostile name."""
    root = write_folder(tmp_path_factory.mktemp("pick") / "photos", per_class=20)
    for copy in range(4):
        shutil.copy(root / "red" / "000.png", root / "red" / f"copy-{copy}.png")
    stripes = np.zeros((32, 32, 3), dtype=np.uint8)
    stripes[::2] = 255
    Image.fromarray(stripes).save(root / "green" / "<script>alert(1)'.png")
    (root / "blue" / "broken.jpg").write_bytes(b"no picture")
    return root


class Colors(torch.nn.Module):
    """A net that sees the colors of the four quarters."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture(scope="module", autouse=True)
def seen_by_colors():
    """The tests' tiny net has learnt nothing; this one tells the classes apart."""
    with pytest.MonkeyPatch.context() as patch:
        load = module.load_feature_net
        patch.setattr(module, "load_feature_net", lambda model: (Colors(), load(model)[1]))
        yield


@pytest.fixture(scope="module")
def picked(photos, carved_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("picked") / "new" / "list.csv"
    return package.pick(photos, model=carved_model, count=3, out=out), out


def test_every_class_is_picked_and_no_picture_twice(picked):
    found, _ = picked
    chosen = [one for one in found if one.order]
    assert [one.order for one in chosen] == [1, 2, 3]
    assert len({one.path for one in found}) == len(found)
    assert {one.path.split("/")[-2] for one in chosen} == {"blue", "green", "red"}
    for one in chosen:
        assert not {other.path for other in chosen} & set(one.near_duplicates)
    alone, broken = found[3:]
    assert "<script>" in alone.path
    assert alone.order is None
    assert (broken.path.rpartition("/")[2], broken.order, broken.readable) == ("broken.jpg", None, False)


def test_near_duplicates_are_named_and_count_once(photos, carved_model, tmp_path):
    # All of red: the copies are the most typical of it.
    found = package.pick(photos / "red", model=carved_model, count=20, out=tmp_path / "l.txt")
    assert sum("copy-" in one.path or "000.png" in one.path for one in found if one.order) == 1
    (group,) = [one for one in found if one.near_duplicates]
    assert {path.rpartition("/")[2] for path in [group.path, *group.near_duplicates]} == {
        "000.png",
        *(f"copy-{copy}.png" for copy in range(4)),
    }
    assert "4 near-duplicates" in group.reason
    assert (tmp_path / "l.txt").read_text().splitlines() == [one.path for one in found if one.order]


def test_list_and_page_say_what_was_returned(picked):
    found, out = picked
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["order"], row["path"], row["reason"]) for row in rows] == [
        (str(one.order or ""), one.path, one.reason) for one in found
    ]
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    assert "beside 1 that cannot be read" in page
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == sum(one.readable for one in found)
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_json_lines_and_json_are_the_record(photos, carved_model, tmp_path, edgecl):
    out = tmp_path / "list.jsonl"
    code, printed, said = edgecl(
        "pick", photos, "--model", carved_model, "--count", 3, "--out", out, "--json"
    )
    assert code == 1  # of the broken one, after the list
    assert "1 of 66 pictures could not be read" in said
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert json.loads(printed) == lines
    assert [PickedImage.model_validate(line).order for line in lines][:3] == [1, 2, 3]


def test_choice_does_not_depend_on_how_many_pictures_are_in_memory(
    photos, carved_model, tmp_path, monkeypatch, picked
):
    monkeypatch.setattr(module, "_AT_A_TIME", 7)
    again = package.pick(photos, model=carved_model, count=3, out=tmp_path / "list.csv")
    assert [one.path for one in again] == [one.path for one in picked[0]]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"out": "list.xlsx"}, ArtifactError, ".csv, .jsonl, .txt"),
        ({"out": "taken.csv"}, ArtifactError, "'taken.html' already exists"),
        ({"model": "nowhere"}, ArtifactError, "nowhere"),
        ({"photos": "nowhere"}, DataError, "no folder 'nowhere'"),
        ({"count": 1000}, DataError, "1,000 pictures cannot be picked from 66"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    given, error, words, photos, carved_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.html").touch()
    asked = {"photos": photos, "model": carved_model, "count": 3, "out": "new/list.csv", **given}
    with pytest.raises(error, match=re.escape(words)):
        package.pick(asked.pop("photos"), **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.html"]


def test_thumbnails_are_small_and_whole(photos):
    import base64

    from edgecl.data.sources import open_source

    source = open_source(str(photos / "green"))
    content = base64.b64decode(module._thumbnail(source, 0))
    assert Image.open(io.BytesIO(content)).size == (32, 32)


def test_choice_rests_on_directions_alone(monkeypatch):
    """Small features lie close together without being typical; by their distances pick lost to random draws."""
    monkeypatch.setattr(module, "_MOST_OUTLIERS", 0)
    random = torch.Generator().manual_seed(0)
    features = torch.randn(200, 16, generator=random)
    hashes = torch.randn(200, 120, generator=random).sign()
    names = SimpleNamespace(describe=str)

    def chosen(features):
        seen = module._Seen(list(range(200)), features, hashes, 0)
        return [index for _, index in module._choose(seen, names, count=20)]

    assert chosen(features * torch.rand(200, 1, generator=random).add(0.1)) == chosen(features)
