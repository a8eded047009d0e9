"""The evaluator: which images it takes, and its numbers against independent ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgecl.config.target import Graph
from edgecl.deploy.accuracy import Evaluator, Outputs, cosines, open_evaluator
from edgecl.deploy.onnx import onnx_from_net
from edgecl.deploy.session import session_of
from edgecl.errors import DataError
from edgecl.nets.model_dir import load_model
from edgecl.storage.records import ModelRecord, Preprocessing

PREPROCESSING = Preprocessing(image_size=8, resize_size=8, mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])


CLASSES = ["blue", "green", "red"]


def opened(classes, *, uri=None, fallback="demo", label_sets=False):
    """The evaluator of a net with these classes: all that is read of its record here."""
    read: dict[str, Any] = {"classes": classes, "label_sets": label_sets}
    record = ModelRecord.model_construct(**read)
    uri = uri and str(uri)
    return open_evaluator(record, uri=uri, fallback=str(fallback), preprocessing=PREPROCESSING)


def test_classifier_is_evaluated_on_the_fifth_that_is_held_out(image_folder):
    evaluator = opened(CLASSES, fallback=image_folder)
    assert evaluator.metric == "top1"
    assert len(evaluator) == 12
    assert evaluator.labels.bincount().tolist() == [4, 4, 4]
    assert evaluator.data.endswith("(held out)")


def test_classifier_is_evaluated_on_all_that_the_user_names(image_folder):
    evaluator = opened(CLASSES, uri=image_folder)
    assert (evaluator.metric, len(evaluator)) == ("top1", 60)


def test_features_are_evaluated_by_neighbors_with_known_labels(image_folder):
    evaluator = opened(None, uri=image_folder)
    assert evaluator.metric == "knn_top1"
    assert (len(evaluator), len(evaluator.bank)) == (30, 30)
    both = torch.cat([evaluator.images, evaluator.bank]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 60


def test_images_without_labels_are_evaluated_by_similarity(unlabelled_folder):
    evaluator = opened(["a", "b"], fallback=unlabelled_folder)
    assert (evaluator.metric, evaluator.labels, len(evaluator)) == ("mean_cosine", None, 24)


@pytest.mark.parametrize(
    ("uri", "classes", "label_sets", "words", "hint"),
    [
        ("unlabelled", None, False, "these images have no labels", "ROOT/CLASS"),
        (
            *("folders", ["a", "b"], False),
            *("'blue' and 2 more are not the net's; 'a' and 1 more are missing", "ROOT/CLASS"),
        ),
        ("sets", CLASSES, False, "have sets of classes, and this net needs one class each", "ROOT/CLASS"),
        ("folders", CLASSES, True, "have one class each, and this net needs sets of classes", "'labels'"),
    ],
)
def test_images_named_for_their_labels_must_have_those_of_the_net(
    image_folder, unlabelled_folder, tmp_path, uri, classes, label_sets, words, hint
):
    (tmp_path / "one.png").write_bytes((image_folder / "red" / "000.png").read_bytes())
    (tmp_path / "sets.csv").write_text("file,labels\none.png,blue;green;red\n")
    named = {"unlabelled": unlabelled_folder, "folders": image_folder, "sets": f"csv:{tmp_path}/sets.csv"}
    with pytest.raises(DataError, match=words) as caught:
        opened(classes, uri=named[uri], label_sets=label_sets)
    assert hint in caught.value.hint


def test_top1_is_the_percentage_of_right_answers():
    labels = torch.tensor([0, 1, 2, 3])
    logits = torch.eye(4)
    logits[3] = logits[0]
    evaluator = Evaluator(
        "top1", torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels, None, None, PREPROCESSING, "test"
    )
    found = evaluator.accuracy(Outputs(logits, None), Outputs(torch.eye(4), None))
    assert found.value == 75
    assert found.ci95[0] < 75 < found.ci95[1]
    assert found.mean_cosine == pytest.approx(0.75)


def test_images_are_normalized_before_they_are_run():
    seen = []

    def run(images):
        seen.append(images)
        return images.reshape(len(images), -1)

    pixels = torch.full((3, 3, 8, 8), 255, dtype=torch.uint8)
    Evaluator("mean_cosine", pixels, None, None, None, PREPROCESSING, "test").outputs(run)
    assert np.allclose(seen[0], (1 - 0.5) / 0.25)


def test_cosine_of_two_zero_vectors_is_one_and_of_one_is_zero():
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert float(cosines(zero, zero)) == 1
    assert float(cosines(zero, one)) == 0
    assert float(cosines(-one, one)) == pytest.approx(-1)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_model_of_one_image_is_run_on_any_number(carved_model, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    net, _ = load_model(carved_model)
    model = onnx_from_net(net, graph=Graph(batch=1), shape=(3, 32, 32), metadata={})
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(images).numpy()
    found = session_of(model, runtime=runtime)(images.numpy())
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
