"""Which recipe is chosen for which pictures, machine and target: a table of rules, and whole recipes kept as files.

`python -m tests.config.test_proposal` writes the files anew after a change that is meant.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgecl.config.proposal import advise, choose_length, choose_recipe, describe, hours_of, recipe_text
from edgecl.config.recipe import read_recipe
from edgecl.config.settings import parse_toml
from edgecl.config.target import read_target
from edgecl.data.sources import open_source
from edgecl.data.survey import MOST_READ, sample, survey
from edgecl.errors import RecipeError
from edgecl.storage.records import Machine, Survey, Timing

GOLDEN = Path(__file__).parent / "golden"
CPU = Machine(device="cpu", name="a processor", cores=4, memory_mib=16_000, bf16=False)
GPU = Machine(device="cuda", name="a GPU", cores=16, memory_mib=80_000, bf16=True)
TIMING = Timing(steps=10, images_per_s=100.0, peak_mib=2000.0)


def seen(images=20_000, side=500, **others):
    return Survey(
        **{
            "uri": "photos",
            "images": images,
            "read": min(images, MOST_READ),
            "unreadable": [],
            "shorter_side": [side, side, side],
            "aspect": [1.3, 1.3, 1.3],
            "grayscale": 0.0,
            "duplicates": [],
            **others,
        }
    )


# --- rules ---


@pytest.mark.parametrize(
    ("survey", "machine", "target", "base", "settings"),
    [
        (seen(side=32), CPU, None, "small", {"data.image_size": 32, "host.stem_stride": 1}),
        (seen(side=64), CPU, None, "small", {"data.image_size": 64}),
        (seen(side=100), CPU, None, "photos", {"data.image_size": 96, "data.resize_size": 109}),
        (seen(side=3000), CPU, None, "photos", {"data.image_size": 224, "run.precision": "fp32"}),
        (seen(), GPU, None, "photos", {"run.precision": "bf16", "data.batch_size": 128}),
        (seen(), GPU.model_copy(update={"bf16": False}), None, "photos", {"run.precision": "fp16"}),
        (seen(200_000), GPU, None, "photos-large", {"host.arch": "mobilenetv3_large_100"}),
        (seen(200_000), CPU, None, "photos", {}),
        (seen(200_000), GPU, "jetson-nano-jp4", "photos", {"host.arch": "mobilenetv4_conv_small"}),
        (seen(200_000), GPU, "ort-cpu", "photos", {}),
        (seen(200_000), GPU, "jetson", "photos-large", {}),
        # Decoded they take 15 GB: more than the recipe keeps, less than half of what is free, or more.
        (seen(60_000), GPU, None, "photos", {"data.cache_mib": 14_239, "data.workers": 8}),
        (seen(60_000), CPU, None, "photos", {"data.cache_mib": 4096, "data.workers": 4}),
        (seen(1_200), CPU, None, "photos", {"data.batch_size": 64, "optim.lr_batch": 128}),
        (seen(20), CPU, None, "photos", {"data.batch_size": 10}),
        (seen(grayscale=0.95), CPU, None, "photos", {"views.saturation": 0.0, "views.brightness": 0.4}),
        (seen(unreadable=["x"] * 200), CPU, None, "photos", {"data.max_bad_fraction": 0.077}),
        (seen(smallest_class=5), CPU, None, "photos", {"probe.labels_per_class": 4}),
    ],
)
def test_rule(survey, machine, target, base, settings):
    choice = choose_recipe(survey, machine, target=target and read_target(target))
    assert choice.base == base
    for name, value in settings.items():
        table, key = name.split(".")
        assert getattr(getattr(choice.recipe, table), key) == value, name
    # A reason for each difference from the packaged recipe, and for nothing else.
    packaged, own = read_recipe(base).model_dump(), choice.recipe.model_dump()
    differs = {
        f"{table}.{key}"
        for table in own
        for key, value in own[table].items()
        if packaged[table][key] != value
    }
    assert differs == set(choice.reasons)


def test_given_weights_go_on_gently_whatever_the_pictures():
    given = {"host.init": "net", "host.arch": "mobilenetv3_small_100", "host.stem_stride": None}
    for pictures in (seen(300, side=32), seen(5_000), seen(200_000)):
        choice = choose_length(choose_recipe(pictures, GPU, weights=given), pictures, TIMING, hours=1000)
        recipe, gentle = choice.recipe, read_recipe("continue")
        assert (recipe.optim.lr, recipe.run.epochs) == (gentle.optim.lr, gentle.run.epochs)
        assert (recipe.host.init, recipe.host.stem_stride) == ("net", None)


def test_target_decides_the_size_of_a_view():
    target = read_target("ort-cpu")
    wanted = target.model_copy(update={"graph": target.graph.model_copy(update={"image_size": 160})})
    assert choose_recipe(seen(side=32), CPU, target=wanted).recipe.data.image_size == 160


def test_hours_are_filled_and_not_exceeded():
    survey = seen(18_000)
    choice = choose_length(choose_recipe(survey, CPU), survey, TIMING, hours=7)
    taken = hours_of(choice, survey, TIMING)
    assert 6.5 <= taken <= 7
    assert taken == 18_000 * choice.recipe.run.epochs / 100 / 3600
    assert advise(choice, survey, hours=taken)[0] == "pretrain"


def test_without_hours_few_pictures_are_gone_through_more_often():
    epochs = {
        images: choose_length(
            choose_recipe(seen(images), CPU), seen(images), TIMING, hours=None
        ).recipe.run.epochs
        for images in (50_000, 5_000, 2_500, 100)
    }
    assert epochs == {50_000: 100, 5_000: 100, 2_500: 200, 100: 800}


@pytest.mark.parametrize(
    ("survey", "hours", "advice", "word"),
    [
        (seen(300), None, "fine-tune", "too few to pretrain"),
        (seen(999), None, "fine-tune", "too few to pretrain"),
        (seen(1_000), None, "pretrain", "1,000 pictures"),
        (seen(50_000), 0.2, "fine-tune", "1 epoch, too few to learn"),
    ],
)
def test_advice(survey, hours, advice, word):
    choice = choose_length(choose_recipe(survey, CPU), survey, TIMING, hours=hours)
    said = advise(choice, survey, hours=hours_of(choice, survey, TIMING))
    assert said[0] == advice
    assert word in said[1]


def test_a_name_cannot_leave_its_comment_or_its_text():
    name = 'a\n[run]\nepochs = 1 # "\\'
    survey = seen(
        uri=name, unreadable=[name], leaks=[[name, name]], labelled_read=1, duplicates=[[name, name]]
    )
    choice = choose_recipe(survey, CPU)
    text = recipe_text(choice, describe(survey, CPU, TIMING))
    assert parse_toml(text, source="", error=RecipeError) == choice.tables
    assert choice.recipe.data.uri == name


def test_leaks_say_how_many_were_found_where():
    """Nothing found is worth as much as what was searched."""
    looked = {"images": 50_000, "labelled": 100, "labelled_read": 90}
    none = "\n".join(describe(seen(**looked, searched=0), CPU, TIMING))
    assert (
        "No leak found: 100 labelled pictures looked for, 90 by their looks among 5,000 (10% of the folder)"
        in none
    )
    assert "--json" not in none
    pairs = [[f"photos/{one}", f"labelled/{one}"] for one in range(7)]
    some = "\n".join(describe(seen(**looked, searched=50_000, leaks=pairs), CPU, TIMING))
    assert "LEAK: 7 of 100 labelled pictures" in some
    assert "labelled/4 is photos/4 …" in some
    assert "all byte for byte among 50,000 of 50,000" in some
    assert "`--json` names all" in some


# --- whole recipes ---


def write_pictures(root):
    """Write folders of 300, 5,000 and 60,000 names over 5,000 pictures; in the last, those that are read differ."""
    pool = root / "pool"
    pool.mkdir()
    for folder in ("300", "5000", "60000"):
        (root / folder).mkdir()
    random = np.random.default_rng(0)
    for index in range(MOST_READ):
        blocks = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize((128, 96), Image.Resampling.BILINEAR)
        image.save(pool / f"{index:04}.jpg")
        for folder in ("300", "5000"):
            if index < int(folder):
                os.link(pool / f"{index:04}.jpg", root / folder / f"{index:04}.jpg")
    read = {place: index for index, place in enumerate(sample(60_000).tolist())}
    for place in range(60_000):
        os.link(pool / f"{read.get(place, 0):04}.jpg", root / "60000" / f"{place:05}.jpg")
    # A copy in a small folder, and one beside its picture in a large one.
    for folder, original, copy in (("300", "0017.jpg", "0017-copy.jpg"), ("60000", "00003.jpg", "00004.jpg")):
        (root / folder / copy).unlink(missing_ok=True)
        os.link(root / folder / original, root / folder / copy)


def proposed(root, folder):
    found = survey(open_source(str(root / folder)))
    assert found.images == {"300": 301, "5000": 5_000, "60000": 60_000}[folder]
    found = Survey.model_validate_json(found.model_dump_json().replace(str(root), "/data"))
    machine = GPU if folder == "60000" else CPU
    choice = choose_length(choose_recipe(found, machine), found, TIMING, hours=None)
    advice, why = advise(choice, found, hours=hours_of(choice, found, TIMING))
    return recipe_text(choice, [f"{advice}: {why}", "", *describe(found, machine, TIMING)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root)
    return root


@pytest.mark.parametrize("folder", ["300", "5000", "60000"])
def test_recipe_of_a_generated_folder_is_the_one_that_was_read_and_found_good(folders, folder):
    assert proposed(folders, folder) == (GOLDEN / f"{folder}-pictures.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.toml")), ids=lambda file: file.stem)
def test_kept_recipe_is_a_recipe(file):
    assert read_recipe(str(file)).run.epochs > 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        write_pictures(Path(scratch))
        for name in ("300", "5000", "60000"):
            (GOLDEN / f"{name}-pictures.toml").write_text(proposed(Path(scratch), name), encoding="utf-8")
