"""The probe: its record, that features are frozen, and that nothing is chosen on the test images."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

import edgecl.evaluate.probe
from edgecl.errors import DataError
from edgecl.evaluate.cost import forward_cost
from edgecl.evaluate.probe import load_feature_net, probe, probe_all, probe_net, side_by_side, summary
from edgecl.metrics.intervals import mean_interval, proportion_interval
from edgecl.metrics.linear import fit_linear
from edgecl.storage.directories import ModelDir
from edgecl.storage.record_files import read_record, write_record
from edgecl.storage.records import ProbeRecord
from edgecl.train.carve import carve


@pytest.fixture
def evaluator(tiny_backbone, colored, preprocessing):
    def evaluator(labelled=colored, **options):
        return probe_net(
            tiny_backbone,
            labelled,
            preprocessing=preprocessing,
            **{"labels_per_class": 2, "draws": 3, "made_from": None, **options},
        ).record

    return evaluator


@pytest.fixture(scope="module")
def probed(tmp_path_factory, carved_model, image_folder):
    model = shutil.copytree(carved_model, tmp_path_factory.mktemp("probe") / "m")
    return model, probe(model, data=str(image_folder), labels_per_class=2)


def test_record_is_kept_in_the_model_directory(probed):
    model, record = probed
    assert read_record(ModelDir(model).probe_file, ProbeRecord) == record
    assert record.kind == "probe"
    assert record.made_from == ModelDir(model).sha256
    assert (record.n_train, record.n_test, record.classes) == (48, 12, 3)


def test_colors_are_told_apart_in_percent_with_intervals(evaluator):
    record = evaluator(draws=4)
    for name in ("knn", "linear"):
        top1 = getattr(record, f"{name}_top1")
        assert top1 > 90
        assert getattr(record, f"{name}_ci95") == list(proportion_interval(top1, 30))
    few = record.few_label_top1
    assert few.mean == pytest.approx(sum(few.draws) / 4)
    assert few.ci95 == pytest.approx(list(mean_interval(few.draws)))
    assert few.labels_per_class == 2


def test_test_images_and_labels_change_no_classifier(evaluator, colored, monkeypatch):
    """Nothing is chosen, scaled or fitted on the held-out part; few labels are learned from alone."""
    sizes = []

    def fits(labelled):
        found = []

        def watching(features, labels, *, classes):
            sizes.append(len(labels))
            found.append(fit_linear(features, labels, classes=classes))
            return found[-1]

        monkeypatch.setattr(edgecl.evaluate.probe, "fit_linear", watching)
        evaluator(labelled)
        return found

    other = dataclasses.replace(
        colored.test, images=255 - colored.test.images, labels=colored.test.labels.flip(0)
    )
    before, after = fits(colored), fits(dataclasses.replace(colored, test=other))
    assert sizes == 2 * [36, 6, 6, 6]
    for one, two in zip(before, after, strict=True):
        for field in dataclasses.fields(one):
            assert torch.equal(
                torch.as_tensor(getattr(one, field.name)), torch.as_tensor(getattr(two, field.name))
            )


def test_more_labels_than_there_are_is_refused_before_anything_runs(evaluator, monkeypatch):
    monkeypatch.setattr(edgecl.evaluate.probe, "extract_features", None)
    with pytest.raises(DataError, match="class 0 has 12 images to learn from, fewer than the 13 labels"):
        evaluator(labels_per_class=13)


# --- several nets ---


@pytest.fixture(scope="module")
def several(tmp_path_factory, trained_run, carved_model, image_folder):
    """The host and the slim net of one run, probed together."""
    root = tmp_path_factory.mktemp("several")
    carve(trained_run, out=root / "host", width=0.75)
    shutil.copytree(carved_model, root / "slim")
    models = [root / "host", root / "slim"]
    return models, probe_all(models, data=str(image_folder), labels_per_class=2)


def test_each_of_several_nets_keeps_the_record_it_would_have_alone(several, image_folder, tmp_path):
    models, records = several
    for model, record in zip(models, records, strict=True):
        assert read_record(ModelDir(model).probe_file, ProbeRecord) == record
        assert record.made_from == ModelDir(model).sha256
        alone = shutil.copytree(model, tmp_path / model.name)
        assert probe(alone, data=str(image_folder), labels_per_class=2) == record
    assert records[0].made_from != records[1].made_from


def test_images_are_read_again_only_for_a_net_that_sees_them_otherwise(
    several, image_folder, monkeypatch, tmp_path
):
    models, _ = several
    other = shutil.copytree(models[1], tmp_path / "large")
    record = ModelDir(other).read()
    record.preprocessing.image_size = record.preprocessing.resize_size = 24
    write_record(ModelDir(other).record_file, record)
    read, sizes = edgecl.evaluate.probe.read_labelled, []

    def watching(*words, **named):
        labelled = read(*words, **named)
        sizes.append(labelled.test.images.shape[-1])
        return labelled

    monkeypatch.setattr(edgecl.evaluate.probe, "read_labelled", watching)
    probe_all([*models, other], data=str(image_folder), labels_per_class=2, seeds=2)
    assert sizes == [32, 24]


def test_nets_side_by_side_are_sorted_by_what_they_cost(several):
    models, records = several
    table = side_by_side(models, records)
    assert [row.width for row in table] == [0.5, 0.75]
    assert [row.model for row in table] == [str(model) for model in models[::-1]]
    assert [row.probe for row in table] == records[::-1]
    for row in table:
        net, record = load_feature_net(Path(row.model))
        assert row.params == record.params
        assert row.macs == forward_cost(net, (1, 3, 32, 32)).macs
        assert row.made_from == record.made_from


def test_one_draw_has_a_mean_and_no_interval():
    found = summary([50.0], labels_per_class=5)
    assert (found.mean, found.std, found.ci95, found.draws) == (50.0, 0.0, None, [50.0])
