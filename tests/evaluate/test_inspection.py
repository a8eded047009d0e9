"""What a net confuses, its most confident mistakes and the map of its features, against counts by hand and NumPy."""

from __future__ import annotations

import base64
import io
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from edgecl.errors import ArtifactError
from edgecl.evaluate.inspection import MAP_POINTS, MISTAKES, feature_map, inspect, principal_components
from edgecl.evaluate.labelled import Labelled, Part
from edgecl.evaluate.probe import probe
from edgecl.storage.directories import ModelDir
from edgecl.storage.record_files import read_record
from edgecl.storage.records import InspectionRecord, parse_record


@pytest.fixture
def guesses():
    """240 pictures, each of one gray that tells which it is, their features, and logits that are often wrong."""
    drawn = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 3
    images = torch.arange(240, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    logits = torch.randn(240, 3, generator=drawn) * 3
    return torch.randn(240, 5, generator=drawn), logits, Part(images, labels)


def inspected(guesses):
    features, logits, part = guesses
    labelled = Labelled(part, part, ("gear", "nut", "bolt"), train_from="drawn", test_from="drawn")
    return inspect(features, logits, labelled, predicted_by="classifier", made_from=None)


def test_confusion_counts_every_image_once(guesses):
    _, logits, part = guesses
    record = inspected(guesses)
    by_hand = Counter(zip(part.labels.tolist(), logits.argmax(1).tolist(), strict=True))
    assert {(one.label, one.predicted): one.images for one in record.confusion} == by_hand


def test_mistakes_are_the_wrong_images_with_the_largest_softmax(guesses):
    _, logits, part = guesses
    chances = np.exp(logits.double().numpy())
    chances /= chances.sum(1, keepdims=True)
    wrong = [index for index in range(240) if chances[index].argmax() != part.labels[index]]
    expected = sorted(wrong, key=lambda index: -chances[index].max())[:MISTAKES]
    found = inspected(guesses).mistakes
    pictures = [Image.open(io.BytesIO(base64.b64decode(one.picture))) for one in found]
    assert [round(np.asarray(picture).mean()) for picture in pictures] == expected
    assert [one.confidence for one in found] == pytest.approx(chances.max(1)[expected], rel=1e-5)
    assert [(one.label, one.predicted) for one in found] == [
        (int(part.labels[index]), int(chances[index].argmax())) for index in expected
    ]


def test_principal_components_are_the_eigenvectors_of_the_covariance():
    features = torch.randn(60, 7, generator=torch.Generator().manual_seed(1)).double() @ torch.diag(
        torch.tensor([1.0, 5.0, 2.0, 0.5, 3.0, 1.0, 1.0]).double()
    )
    points, shares = principal_components(features)
    values, vectors = np.linalg.eigh(np.cov(features.numpy(), rowvar=False))
    for place in (0, 1):
        direction = vectors[:, -1 - place]
        direction = direction * np.sign(direction[np.abs(direction).argmax()])
        expected = (features.numpy() - features.numpy().mean(0)) @ direction
        np.testing.assert_allclose(points[:, place].numpy(), expected, atol=1e-10)
        assert shares[place] == pytest.approx(values[-1 - place] / values.sum())


@pytest.mark.parametrize("images", [1, 2, MAP_POINTS + 1])
def test_a_map_has_a_point_for_each_image_up_to_its_most(images):
    found = feature_map(torch.randn(images, 4), torch.arange(images) % 2)
    expected = min(images, MAP_POINTS)
    assert len(found.x) == len(found.y) == len(found.label) == expected
    assert np.isfinite([*found.x, *found.y]).all()


def test_of_images_whose_classes_come_in_turn_all_are_on_the_map():
    found = feature_map(torch.randn(4 * MAP_POINTS, 4), torch.arange(4 * MAP_POINTS) % 8)
    assert min(found.label.count(label) for label in range(8)) > MAP_POINTS / 16


def test_features_without_any_difference_lie_in_one_point():
    found = feature_map(torch.ones(20, 4), torch.zeros(20, dtype=torch.int64))
    assert np.abs([*found.x, *found.y]).max() < 1e-9


def test_probe_leaves_an_inspection_whose_diagonal_is_its_accuracy(tmp_path, carved_model, image_folder):
    copied_model = shutil.copytree(carved_model, tmp_path / "m")
    record = probe(copied_model, data=str(image_folder), labels_per_class=2)
    found = read_record(ModelDir(copied_model).inspection_file, InspectionRecord)
    right = sum(one.images for one in found.confusion if one.label == one.predicted)
    assert 100 * right / record.n_test == pytest.approx(record.linear_top1)
    assert found.made_from == ModelDir(copied_model).sha256
    assert len(found.classes) == record.classes


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["gear"]},
        {"map": {"made_by": "PCA", "explained": None, "x": [1.0], "y": [], "label": [0]}},
    ],
)
def test_an_inspection_that_does_not_fit_itself_is_refused(guesses, tmp_path, change):
    content = inspected(guesses).to_json() | change
    with pytest.raises(ArtifactError, match=r"classes|different numbers"):
        parse_record(content, InspectionRecord, path=tmp_path / "inspection.json")
