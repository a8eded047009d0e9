"""`edgecl init`: the recipe it writes is a recipe, is priced as `edgecl cost` prices it, and trains."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import timm
import torch
from conftest import write_folder
from safetensors.torch import load_file, save_file

import edgecl as package
from edgecl.config.proposal import choose_recipe
from edgecl.config.recipe import read_recipe
from edgecl.data.sources import open_source
from edgecl.data.survey import survey
from edgecl.errors import ArtifactError, DataError, DeviceError, RecipeError, TargetError
from edgecl.evaluate import init as module
from edgecl.storage.directories import ModelDir
from edgecl.storage.records import Proposal
from edgecl.train.timing import look_at_machine, time_steps


@pytest.fixture(scope="module")
def written(tmp_path_factory, image_folder):
    """What `init` prints with --json, and the recipe."""
    out = tmp_path_factory.mktemp("init") / "new" / "recipe.toml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgecl.train.timing._MOST_STEPS", 4)
        found = package.init(image_folder, out=out, labels=image_folder, hours=0.5)
    return found, out


def test_recipe_is_read_and_priced_as_cost_prices_it(written):
    found, out = written
    recipe = read_recipe(str(out))
    assert recipe.data.batch_size == 30
    assert package.cost(out).training.total_flops == found.total_flops
    assert found.hours == pytest.approx(60 * recipe.run.epochs / found.timing.images_per_s / 3600, abs=1e-3)
    assert found.hours <= 0.5
    assert out.read_text().startswith("# Fine-tune: 60 pictures are too few")
    assert len(found.survey.leaks) == 60  # the labelled ones are the same


def test_recipe_trains_without_change(written, tmp_path):
    record = package.pretrain(written[1], out=tmp_path / "run", set={"run.epochs": 1})
    assert (record.state, record.data.images) == ("done", 60)


def test_json_is_the_record(written, edgecl, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("edgecl.train.timing._MOST_STEPS", 3)
    code, out, _ = edgecl("init", image_folder, "--out", tmp_path / "r.toml", "--json")
    assert code == 0
    found = Proposal.model_validate(json.loads(out))
    unlabelled = {"leaks": [], "labelled": None, "labelled_read": None, "searched": None}
    assert found.survey == written[0].survey.model_copy(update=unlabelled)
    assert found.reasons.keys() <= written[0].reasons.keys() | {"run.epochs"}


def test_timed_steps_learn_from_files_where_not_all_fit_into_memory(image_folder):
    source = open_source(str(image_folder))
    choice = choose_recipe(survey(source), look_at_machine()).put("", {"data.cache_mib": 0, "run.threads": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgecl.train.timing._MOST_STEPS", 3)
        timing = time_steps(choice.recipe, source)
    assert timing.steps == 1
    assert timing.images_per_s > 0
    assert timing.peak_mib > 100


def test_batch_is_halved_until_it_fits_into_a_gpu(monkeypatch, image_folder):
    tried = []

    def full(recipe, source):
        tried.append(recipe.data.batch_size)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "time_steps", full)
    source = open_source(str(image_folder))
    many = survey(source).model_copy(
        update={"images": 10_000, "read": 5_000, "shorter_side": [300, 300, 300]}
    )
    with pytest.raises(DeviceError, match="32 pictures does not fit"):
        module._timed(choose_recipe(many, look_at_machine()), source)
    assert tried == [128, 64, 32]


def test_given_weights_decide_the_net_and_how_its_pictures_are_normalized(
    carved_model, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("edgecl.train.timing._MOST_STEPS", 3)
    out = tmp_path / "recipe.toml"
    package.init(image_folder, out=out, weights=carved_model)
    recipe = read_recipe(str(out))
    net = ModelDir(carved_model).read()
    assert recipe.host.init == str(carved_model)
    assert (recipe.host.arch, recipe.host.width, recipe.slim.width) == (net.arch, net.width, net.width)
    assert f"edgecl finetune {carved_model} --data LABELLED" in out.read_text()
    package.pretrain(out, out=tmp_path / "run", set={"run.epochs": 1})


def test_a_file_of_weights_is_fine_tuned_by_the_commands_that_the_recipe_names(
    edgecl, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("edgecl.train.timing._MOST_STEPS", 3)
    monkeypatch.chdir(tmp_path)
    arch = "mobilenetv3_small_050"
    save_file(timm.create_model(arch).state_dict(), "w.safetensors")
    shutil.copytree(image_folder, "photos")
    (tmp_path / "photos" / "red" / "unreadable.jpg").touch()
    write_folder(tmp_path / "held-out", per_class=3)
    asked = ("init", "photos", "--labels", image_folder, "--test", "held-out", "--out", "r.toml")
    code, plain, said = edgecl(*asked, "--hours", "1")
    assert code == 0
    assert said.count("left out") == 1
    (again,) = re.findall(r"^  edgecl (init .*)$", plain, flags=re.M)
    again = again.replace("FILE", "w.safetensors")
    code, _, said = edgecl(*again.replace("NAME", "resnet18").split())
    assert code == 1
    assert "not those of 'resnet18'" in said
    assert "`--arch` of `edgecl init`" in said
    code, text, said = edgecl(*again.replace("NAME", arch).split())
    assert code == 0
    assert "`--hours` chooses" in text
    assert "`--hours` chooses" not in plain
    carve, finetune = re.findall(r"^  edgecl ((?:carve|finetune) .*)$", text, flags=re.M)
    assert edgecl(*carve.split())[0] == 0
    given, written = load_file("w.safetensors"), load_file(ModelDir("models/given").weights_file)
    assert all(torch.equal(given[name], tensor) for name, tensor in written.items())
    assert edgecl(*finetune.split(), "--epochs", "1")[0] == 0
    assert ModelDir("models/classifier").read().made_from == ModelDir("models/given").sha256


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"out": "recipe.txt"}, RecipeError, "let it end in .toml"),
        ({"out": "taken.toml"}, ArtifactError, "already exists"),
        ({"photos": "nowhere"}, DataError, "no folder 'nowhere'"),
        ({"labels": "nowhere"}, DataError, "no folder 'nowhere'"),
        ({"target": "jetsno"}, TargetError, "jetsno"),
        ({"weights": "nowhere.pth"}, ArtifactError, "nowhere.pth"),
        ({"arch": "resnet18"}, RecipeError, "of no weights"),
        ({"test": "nowhere"}, DataError, "no folder 'nowhere'"),
    ],
)
def test_bad_input_is_named_before_anything_is_read_or_written(
    given, error, words, image_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.toml").write_text("mine")
    monkeypatch.setattr(module, "survey", None)
    asked = {"photos": image_folder, "out": "new/recipe.toml", **given}
    with pytest.raises(error, match=re.escape(words)):
        package.init(asked.pop("photos"), **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.toml"]
    assert (tmp_path / "taken.toml").read_text() == "mine"
