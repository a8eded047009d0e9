"""Fine-tuning gives a model directory that timm loads and that says how good it is."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

from edgecl.artifacts import ModelDir
from edgecl.errors import ArtifactError, DataError, RecipeError
from edgecl.evaluate.finetune import finetune
from edgecl.evaluate.intervals import proportion_interval
from edgecl.evaluate.labelled import read_labelled
from edgecl.evaluate.probe import load_feature_net, probe
from edgecl.evaluate.supervised import classifier_top1
from edgecl.nets.backbone import create_backbone
from edgecl.nets.carving import load_model, write_model


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory, carved_model):
    """A model directory of width 1.0, which timm itself can build, with random weights."""
    out = tmp_path_factory.mktemp("plain") / "m"
    torch.manual_seed(0)
    net = create_backbone("mobilenetv3_small_100", width=1.0)
    write_model(
        out,
        net,
        arch="mobilenetv3_small_100",
        width=1.0,
        stem_stride=None,
        classes=None,
        preprocessing=ModelDir(carved_model).read()["preprocessing"],
        origin="random",
        made_from=None,
        data=None,
    )
    return out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, plain_model, image_folder):
    """The net with a classifier trained on a frozen backbone, and the record returned."""
    out = tmp_path_factory.mktemp("tuned") / "m"
    record = finetune(
        plain_model,
        data=str(image_folder),
        out=out,
        epochs=2,
        assignments=["backbone_lr_fraction=0", "lr=0.01", "batch_size=16", "device=cpu"],
    )
    return out, record


def test_timm_loads_the_weights_with_so_many_classes(tuned):
    net = timm.create_model("mobilenetv3_small_100", num_classes=3)
    net.load_state_dict(load_file(ModelDir(tuned[0]).weights_file), strict=True)
    ours, _ = load_model(tuned[0])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net.eval()(images), ours(images))


def test_timm_loads_the_file_by_its_path(tuned):
    net = timm.create_model(
        "mobilenetv3_small_100", num_classes=3, checkpoint_path=str(ModelDir(tuned[0]).weights_file)
    )
    assert net.num_classes == 3


def test_record_names_the_classes_and_the_net_it_came_from(tuned, plain_model):
    record = ModelDir(tuned[0]).read()
    assert record["classes"] == ["blue", "green", "red"]
    assert record["origin"] == "finetuned"
    assert record["made_from"] == ModelDir(plain_model).sha256


def test_evaluation_is_of_the_written_net(tuned, image_folder):
    out, record = tuned
    net, model = load_model(out)
    held_out = read_labelled(str(image_folder), test=None, preprocessing=model["preprocessing"]).test
    evaluation = json.loads(ModelDir(out).evaluation_file.read_text())
    assert evaluation == record["evaluation"]
    assert evaluation["top1"] == classifier_top1(net, held_out, model["preprocessing"])
    assert evaluation["made_from"] == ModelDir(out).sha256


def test_evaluation_counts_and_interval_belong_together(tuned, image_folder):
    evaluation = tuned[1]["evaluation"]
    assert (evaluation["n_test"], evaluation["n_train"]) == (12, 48)
    assert evaluation["top1_ci95"] == list(proportion_interval(evaluation["top1"], 12))
    assert evaluation["test"] == (
        f"{image_folder} (20 % held out, stratified; a net pretrained on this folder has seen these images, "
        "without labels)"
    )
    assert evaluation["epochs"] == 2
    assert evaluation["settings"]["lr"] == 0.01


def test_frozen_backbone_is_the_pretrained_one_to_the_bit(tuned, plain_model):
    before = load_file(ModelDir(plain_model).weights_file)
    after = load_file(ModelDir(tuned[0]).weights_file)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert set(after) - set(before) == {"classifier.weight", "classifier.bias"}


def test_features_below_the_classifier_are_what_a_probe_judges(tuned, plain_model):
    features, _ = load_feature_net(tuned[0])
    plain, _ = load_model(plain_model)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(features(images), plain(images))


def test_probe_takes_a_finetuned_net(tmp_path, tuned, image_folder):
    model = shutil.copytree(tuned[0], tmp_path / "m")
    assert probe(model, data=str(image_folder), labels_per_class=2, seeds=2)["n_test"] == 12


def test_unknown_setting_suggests_a_near_one(tmp_path, plain_model, image_folder):
    with pytest.raises(RecipeError) as caught:
        finetune(plain_model, data=str(image_folder), out=tmp_path / "m", assignments=["flp=0.5"])
    assert caught.value.problem == "unknown key 'flp' (did you mean 'flip'?)"
    assert caught.value.where == {"file": "--set"}


def test_existing_output_is_refused_before_training(tmp_path, plain_model, image_folder, monkeypatch):
    monkeypatch.setattr("edgecl.evaluate.finetune.train_classifier", None)
    with pytest.raises(ArtifactError, match="already exists"):
        finetune(plain_model, data=str(image_folder), out=plain_model)


def test_unlabelled_images_are_refused(tmp_path, plain_model, unlabelled_folder):
    with pytest.raises(DataError, match="these images have no labels"):
        finetune(plain_model, data=str(unlabelled_folder), out=tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
