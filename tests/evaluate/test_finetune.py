"""Fine-tuning gives a model directory that timm loads and that says how good it is."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from conftest import write_folder
from PIL import Image
from safetensors.torch import load_file

from edgecl.cli.finetune import SETTINGS
from edgecl.data.loading import eval_image, normalize
from edgecl.deploy.export import export
from edgecl.deploy.predict import predict
from edgecl.deploy.publish import publish
from edgecl.errors import ArtifactError, DataError, RecipeError
from edgecl.evaluate.cost import cost
from edgecl.evaluate.finetune import finetune
from edgecl.evaluate.labelled import read_labelled
from edgecl.evaluate.probe import load_feature_net, probe
from edgecl.evaluate.supervised import (
    FinetuneConfig,
    QuantizedFinetuneConfig,
    classifier_accuracy,
    classifier_logits,
)
from edgecl.metrics.intervals import proportion_interval
from edgecl.metrics.label_sets import image_f1, mean_average_precision
from edgecl.nets.backbone import create_backbone
from edgecl.nets.fake_quant import FakeQuant
from edgecl.nets.model_dir import load_model, write_model
from edgecl.storage.directories import Bundle, ModelDir
from edgecl.storage.records import Quantization


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory, carved_model):
    """A model directory of width 1.0, which timm itself can build, with random weights."""
    out = tmp_path_factory.mktemp("plain") / "m"
    torch.manual_seed(0)
    record = ModelDir(carved_model).read()
    about = {"arch": "mobilenetv3_small_100", "width": 1.0, "stem_stride": None, "classes": None}
    made = {"origin": "random", "made_from": None, "data": None}
    net = create_backbone("mobilenetv3_small_100", width=1.0)
    write_model(out, net, preprocessing=record.preprocessing, **about, **made)
    return out


@pytest.fixture
def tune(tmp_path, image_folder):
    """Fine-tune to the pictures of the folder, into tmp_path/m."""

    def tune(model, *settings, out="m", data=image_folder, **options):
        assignments = [*settings, "device=cpu"]
        return finetune(model, data=str(data), out=tmp_path / out, assignments=assignments, **options)

    return tune


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


def test_record_and_evaluation_are_of_the_written_net(tuned, plain_model, image_folder):
    out, record = tuned
    net, model = load_model(out)
    assert model.classes == ["blue", "green", "red"]
    assert model.origin == "finetuned"
    assert model.made_from == ModelDir(plain_model).sha256
    held_out = read_labelled(str(image_folder), test=None, preprocessing=model.preprocessing).test
    evaluation = json.loads(ModelDir(out).evaluation_file.read_text())
    assert evaluation == record.evaluation.to_json()
    assert evaluation["top1"] == classifier_accuracy(net, held_out, model.preprocessing)
    assert evaluation["made_from"] == ModelDir(out).sha256
    evaluation = record.evaluation
    assert (evaluation.n_test, evaluation.n_train, evaluation.epochs) == (12, 48, 2)
    assert evaluation.top1_ci95 == list(proportion_interval(evaluation.top1, 12))
    assert evaluation.test.startswith(f"{image_folder} (20 % held out, stratified; ")
    assert evaluation.settings["lr"] == 0.01


def test_frozen_backbone_is_the_pretrained_one_to_the_bit(tuned, plain_model):
    before = load_file(ModelDir(plain_model).weights_file)
    after = load_file(ModelDir(tuned[0]).weights_file)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert set(after) - set(before) == {"classifier.weight", "classifier.bias"}


def test_features_below_the_classifier_are_what_a_probe_evaluates(tuned, plain_model):
    features, _ = load_feature_net(tuned[0])
    plain, _ = load_model(plain_model)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(features(images), plain(images))


def test_a_net_may_be_deployed_at_another_size_than_it_was_trained_at(
    tune, tmp_path, plain_model, image_folder
):
    record = tune(plain_model, "test_size=48", "batch_size=16", epochs=1)
    net, model = load_model(tmp_path / "m")
    trained_at = ModelDir(plain_model).read().preprocessing
    assert (model.preprocessing.image_size, trained_at.image_size) == (48, 32)
    assert model.preprocessing.resize_size == round(trained_at.resize_size * 48 / 32)
    held_out = read_labelled(str(image_folder), test=None, preprocessing=model.preprocessing).test
    assert record.evaluation.top1 == classifier_accuracy(net, held_out, model.preprocessing)


def test_a_size_that_the_net_does_not_take_is_refused_before_training(tune, plain_model, monkeypatch):
    monkeypatch.setattr("edgecl.evaluate.finetune.train_classifier", None)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    monkeypatch.setattr("edgecl.evaluate.finetune.load_model", lambda model: (vit, ModelDir(model).read()))
    with pytest.raises(RecipeError, match="does not take pictures of 48 x 48"):
        tune(plain_model, "test_size=48")


@pytest.mark.parametrize(
    ("setting", "quantize", "words"),
    [
        ("flp=0.5", None, "unknown.*'flp'.*mean 'flip'"),
        ("learn_scales=false", None, "unknown.*'learn_scales'"),
        ("flip=0.5", "int4", "quantize.*'int4'"),
    ],
)
def test_wrong_settings_are_named(tune, plain_model, setting, quantize, words):
    with pytest.raises(RecipeError, match=words):
        tune(plain_model, setting, quantize=quantize)


def test_existing_output_is_refused_before_training(tune, tmp_path, plain_model, monkeypatch):
    monkeypatch.setattr("edgecl.evaluate.finetune.train_classifier", None)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").touch()
    with pytest.raises(ArtifactError, match="already exists"):
        tune(plain_model)


def test_help_names_every_setting():
    plain, _, quantized = SETTINGS.partition("; with --quantize also ")
    assert plain.split(", ") == list(FinetuneConfig.model_fields)
    assert [*plain.split(", "), *quantized.split(", ")] == list(QuantizedFinetuneConfig.model_fields)


# --- sets of classes ---


@pytest.fixture(scope="module")
def in_sets(tmp_path_factory, image_folder):
    """A table of the folder's pictures, each of its color and of "even" or not."""
    file = image_folder.parent / "sets.csv"
    pictures = sorted(image_folder.rglob("*.png"))
    rows = [
        f"{picture.relative_to(file.parent)},{picture.parent.name}" + (";even" if index % 2 else "")
        for index, picture in enumerate(pictures)
    ]
    file.write_text("\n".join(["file,labels", *rows]))
    return f"csv:{file}"


@pytest.fixture(scope="module")
def tuned_in_sets(tmp_path_factory, plain_model, in_sets):
    """The net with a classifier for sets of classes, the record returned, and a bundle of it."""
    folder = tmp_path_factory.mktemp("in-sets")
    record = finetune(
        plain_model,
        data=in_sets,
        out=folder / "m",
        epochs=2,
        assignments=["batch_size=16", "device=cpu", "lr=3e-3"],
    )
    export(folder / "m", target="ort-cpu", out=folder / "b", precisions=["fp32"], eval_uri=in_sets)
    return folder / "m", record, folder / "b"


def test_a_net_for_sets_of_classes_says_so_and_its_export_is_evaluated_by_f1(tuned_in_sets, in_sets):
    out, record, bundle = tuned_in_sets
    assert record.label_sets
    assert "even" in record.classes
    assert record.evaluation.metric == "f1"
    net, model = load_model(out)
    held_out = read_labelled(in_sets, test=None, preprocessing=model.preprocessing, label_sets=True).test
    assert held_out.labels.shape == (12, 4)
    logits = classifier_logits(net, held_out, model.preprocessing)
    assert record.evaluation.top1 == pytest.approx(100 * float(image_f1(logits, held_out.labels).mean()))
    assert record.evaluation.mean_average_precision == pytest.approx(
        100 * mean_average_precision(logits, held_out.labels)
    )
    assert not ModelDir(out).inspection_file.exists()
    manifest = Bundle(bundle).read()
    accuracy = manifest.precisions["fp32"].accuracy
    assert (accuracy.metric, manifest.net.label_sets) == ("f1", True)
    whole = read_labelled(in_sets, test=None, preprocessing=model.preprocessing, label_sets=True)
    expected = torch.cat(
        [
            image_f1(classifier_logits(net, part, model.preprocessing), part.labels)
            for part in (whole.train, whole.test)
        ]
    )
    assert accuracy.value == pytest.approx(100 * float(expected.mean()))


def test_each_class_of_a_set_has_a_probability_of_its_own(tuned_in_sets, image_folder):
    out, record, bundle = tuned_in_sets
    net, model = load_model(out)
    picture = min(image_folder.rglob("*.png"))
    images = model.preprocessing
    pixels = eval_image(Image.open(picture), resize_size=images.resize_size, image_size=images.image_size)
    with torch.no_grad():
        expected = torch.sigmoid(net(normalize(pixels[None], images.mean, images.std)))[0]
    for asked in (out, bundle):
        (found,) = predict(asked, [picture], top=4).predictions
        assert {one.name: one.score for one in found.top} == pytest.approx(
            dict(zip(record.classes, expected.tolist(), strict=True)), abs=1e-4
        )
    assert sum(one.score for one in found.top) != pytest.approx(1, abs=1e-2)  # as a softmax's would


def test_a_published_net_for_sets_says_how_its_scores_are_read(tuned_in_sets, tmp_path):
    out, record, bundle = tuned_in_sets
    publish(out, bundle=bundle, out=tmp_path / "published")
    card = (tmp_path / "published" / "README.md").read_text()
    assert ".sigmoid()" in card
    assert "argmax" not in card
    assert "F1" in card
    assert f"{record.evaluation.top1:.1f}" in card
    assert "top-1" not in card


def test_a_probe_needs_one_class_of_each_picture(plain_model, in_sets):
    with pytest.raises(DataError, match="several classes"):
        probe(plain_model, data=in_sets)


# --- quantized ---


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, tuned, image_folder):
    """The fine-tuned net trained on as int8, and the record returned."""
    out = tmp_path_factory.mktemp("quantized") / "m"
    record = finetune(
        tuned[0],
        data=str(image_folder),
        out=out,
        epochs=1,
        quantize="int8",
        assignments=["batch_size=16", "device=cpu"],
    )
    return out, record


def test_quantized_model_loads_as_it_was_trained(quantized, image_folder):
    out, record = quantized
    net, model = load_model(out)
    held_out = read_labelled(str(image_folder), test=None, preprocessing=model.preprocessing).test
    assert record.evaluation.top1 == classifier_accuracy(net, held_out, model.preprocessing)
    scales = [module.scale for module in net.modules() if isinstance(module, FakeQuant)]
    assert scales
    assert not any((scale == 1).any() for scale in scales)


def test_record_says_how_the_net_is_quantized_and_how_good_it_was_before(quantized, tuned):
    out, record = quantized
    model = ModelDir(out).read()
    assert model.quantization.precision == "int8"
    assert model.quantization.learnt is True
    assert {"conv_stem", "classifier", "blocks.0.0.se"} <= set(model.quantization.keep)
    assert model.arch == "mobilenetv3_small_100"
    assert model.made_from == ModelDir(tuned[0]).sha256
    assert ModelDir(tuned[0]).read().quantization is None
    assert record.evaluation.settings["lr"] == 5e-4
    evaluation = json.loads(ModelDir(quantized[0]).evaluation_file.read_text())
    assert evaluation["float_top1"] == tuned[1].evaluation.top1
    for state in ("float_top1", "calibrated_top1", "top1"):
        assert evaluation[f"{state}_ci95"] == list(proportion_interval(evaluation[state], 12))


def test_quantized_training_starts_from_the_nets_own_classifier(quantized, tuned):
    before, after = (load_file(ModelDir(path).weights_file) for path in (tuned[0], quantized[0]))
    moved = (after["classifier.weight"] - before["classifier.weight"]).abs().max()
    assert 0 < moved < 0.01
    assert not any("running_mean" in name for name in after)


def test_scales_stay_as_calibrated_where_they_are_not_learnt(tune, tmp_path, tuned):
    scales = []
    for rate in ("1e-9", "1e-3"):
        settings = (f"lr={rate}", "learn_scales=false", 'keep=["conv_stem"]')
        tune(tuned[0], *settings, out=rate, epochs=1, quantize="int8")
        out = ModelDir(tmp_path / rate)
        weights = load_file(out.weights_file)
        scales.append({name: tensor for name, tensor in weights.items() if name.endswith("scale")})
    assert "blocks.0.0.se.conv_reduce.weight_quantizer.scale" in scales[0]
    assert all(torch.equal(scales[1][name], tensor) for name, tensor in scales[0].items())
    assert out.read().quantization == Quantization(keep=["conv_stem"], learnt=False)


def test_net_without_a_classifier_gets_one_first(tune, tmp_path, plain_model, monkeypatch):
    monkeypatch.setattr("edgecl.evaluate.finetune.DEFAULT_EPOCHS", 1)
    record = tune(plain_model, epochs=1, quantize="int8")
    assert record.classes == ["blue", "green", "red"]
    assert load_model(tmp_path / "m")[0].classifier.out_features == 3


def test_probe_and_cost_take_a_quantized_net(tmp_path, quantized, tuned, image_folder):
    model = shutil.copytree(quantized[0], tmp_path / "m")
    assert probe(model, data=str(image_folder), labels_per_class=2, seeds=2).n_test == 12
    features, _ = load_feature_net(model)
    assert any(isinstance(module, FakeQuant) for module in features.modules())
    counted, plain = cost(model), cost(shutil.copytree(tuned[0], tmp_path / "plain"))
    for operator in ("conv", "linear"):
        assert counted.by_operator[operator] == plain.by_operator[operator]
    # Folded, a norm's weight and bias are one bias.
    norms = sum(
        tensor.numel()
        for name, tensor in load_file(ModelDir(tuned[0]).weights_file).items()
        if name.endswith("running_mean")
    )
    assert counted.params == ModelDir(model).read().params == plain.params - norms


def test_quantized_net_is_not_trained_a_second_time(tune, tmp_path, quantized):
    for quantize in ("int8", None):
        with pytest.raises(ArtifactError, match="quantized already") as caught:
            tune(quantized[0], quantize=quantize)
        assert "float net" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_other_classes_are_refused_before_anything_is_trained(tune, tmp_path, tuned):
    data = write_folder(tmp_path / "data", per_class=5, classes={"cat": (9, 9, 9), "dog": (99, 99, 99)})
    with pytest.raises(DataError, match=r"other classes.*: blue, green, red against cat, dog") as caught:
        tune(tuned[0], data=data, quantize="int8")
    assert "without --quantize" in caught.value.hint


def test_command_line_trains_as_int8_and_prints_all_three_accuracies(tmp_path, tuned, image_folder, edgecl):
    words = ("--data", image_folder, "--out", tmp_path / "m", "--quantize", "int8", "--epochs", 1)
    code, out, err = edgecl("finetune", tuned[0], *words)
    assert code == 0, err
    found = json.loads(ModelDir(tmp_path / "m").evaluation_file.read_text())
    assert out.startswith(
        f"float {found['float_top1']:.1f} %, int8 calibrated {found['calibrated_top1']:.1f} %, trained as int8: "
        f"top-1 {found['top1']:.1f} % ["
    )
