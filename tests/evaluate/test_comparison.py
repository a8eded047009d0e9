"""The pretrained net against its baselines: the same draws for all, differences in pairs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import edgecl.evaluate.few_labels
from edgecl.config.recipe import Probe
from edgecl.config.views import Views
from edgecl.evaluate.comparison import Compared, compare, did_it_pay, difference, write_given, write_random
from edgecl.evaluate.labelled import Part, draw_few, read_labelled
from edgecl.metrics.intervals import mean_interval
from edgecl.nets.backbone import create_backbone
from edgecl.nets.model_dir import load_model
from edgecl.storage.directories import ModelDir
from edgecl.storage.record_files import read_record
from edgecl.storage.records import ProbeRecord

VIEWS = Views(jitter=0.25)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, carved_model, image_folder):
    """A comparison of two draws, and what each from-scratch net was trained on."""
    home = tmp_path_factory.mktemp("comparison")
    pretrained = shutil.copytree(carved_model, home / "slim")
    record = ModelDir(pretrained).read()
    labelled = read_labelled(str(image_folder), test=None, preprocessing=record.preprocessing)
    write_random(home / "random", record, labelled, seed=0)
    trained_on = []

    def watching(net, part, **options):
        trained_on.append((part, options, next(net.parameters()).detach().clone()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edgecl.evaluate.few_labels, "train_classifier", watching)
        patch.setattr(edgecl.evaluate.few_labels, "MAX_PROCESSES", 1)
        settings = Probe(labels_per_class=3, draws=2, scratch_steps=7, scratch_lr=0.003)
        nets = Compared(pretrained, home / "random")
        comparison = compare(nets, labelled, settings=settings, views=VIEWS, seed=5)
    return home, labelled, comparison, trained_on


def rows(comparison):
    return {row.name: row for row in comparison.rows}


def test_every_row_sees_the_same_draws(compared):
    _, labelled, comparison, trained_on = compared
    trained_rows = [row for row in comparison.rows if row.linear_top1 is None]
    assert len(trained_on) == 2 * len(trained_rows)
    for number, (part, _, _) in enumerate(trained_on):
        expected = labelled.train.take(draw_few(labelled.train.labels, per_class=3, draw=number % 2))
        assert torch.equal(part.images, expected.images)
        assert torch.equal(part.labels, expected.labels)


def test_probed_rows_are_their_probes(compared):
    home, _, comparison, _ = compared
    for name, folder in (("pretrained", "slim"), ("random init", "random")):
        found = read_record(ModelDir(home / folder).probe_file, ProbeRecord)
        assert rows(comparison)[name].few_label_top1 == found.few_label_top1
        assert rows(comparison)[name].knn_top1 == found.knn_top1


def test_rows_start_at_their_weights_and_from_scratch_differs_by_draw(compared):
    home, _, comparison, trained_on = compared
    names = [row.name for row in comparison.rows if row.linear_top1 is None]
    starts = {
        name: [start for _, _, start in trained_on[2 * at : 2 * at + 2]] for at, name in enumerate(names)
    }
    pretrained = next(load_model(home / "slim")[0].parameters())
    assert torch.equal(starts["fine-tuned"][0], pretrained)
    assert not torch.equal(*starts["from scratch"])
    assert not torch.equal(starts["from scratch"][0], pretrained)


def test_trained_rows_are_trained_alike(compared):
    for number, (_, options, _) in enumerate(compared[3]):
        assert options["steps"] == 7
        assert options["settings"].lr == 0.003
        assert options["views"] == VIEWS
        assert options["settings"].seed == 5 + number % 2


def test_differences_are_those_of_the_rows(compared):
    comparison = compared[2]
    for found in comparison.differences:
        of_a, of_b = (rows(comparison)[getattr(found, side)].few_label_top1.draws for side in "ab")
        assert found == difference(found.a, found.b, of_a, of_b)
    assert (comparison.draws, comparison.labels_per_class, comparison.n_test) == (2, 3, 12)
    assert {("pretrained", "random init"), ("pretrained", "from scratch")} <= {
        (found.a, found.b) for found in comparison.differences
    }


def test_random_net_is_a_function_of_its_seed_and_never_sees_the_held_out_images(compared, tmp_path):
    home, labelled, *_ = compared
    record = ModelDir(home / "slim").read()
    black = replace(labelled, test=Part(torch.zeros_like(labelled.test.images), labelled.test.labels))
    for name, seed in (("same", 0), ("other", 1)):
        write_random(tmp_path / name, record, black, seed=seed)
    first = ModelDir(home / "random").read()
    assert (first.origin, first.features) == ("random", record.features)
    assert ModelDir(tmp_path / "same").read().weights_sha256 == first.weights_sha256
    assert ModelDir(tmp_path / "other").read().weights_sha256 != first.weights_sha256


# --- weights that somebody has ---


@pytest.fixture(scope="module")
def compared_further(compared, tmp_path_factory):
    """The same comparison of a run that started from given weights, beside a net pretrained from scratch."""
    home, labelled, *_ = compared
    record = ModelDir(home / "slim").read()
    place = tmp_path_factory.mktemp("further")
    for name in ("given", "scratch"):
        weights = place / f"{name}.safetensors"
        net = create_backbone(record.arch, width=record.width, num_classes=4, stem_stride=record.stem_stride)
        save_file(net.state_dict(), weights)
        write_given(place / name, str(weights), record, origin=name)
    nets = Compared(home / "slim", home / "random", place / "given", place / "scratch")
    trained = []
    chance = SimpleNamespace(
        top1=lambda features, labels: 33.0, logits=lambda features: features.new_zeros(len(features), 3)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgecl.evaluate.probe.fit_linear", lambda features, labels, *, classes: chance)
        patch.setattr(
            edgecl.evaluate.few_labels,
            "train_classifier",
            lambda net, part, **options: trained.append(next(net.parameters()).detach().clone()),
        )
        patch.setattr(edgecl.evaluate.few_labels, "MAX_PROCESSES", 1)
        settings = Probe(labels_per_class=3, draws=2, scratch_steps=7)
        comparison = compare(nets, labelled, settings=settings, views=VIEWS, seed=5, wall_s=7200)
    return nets, comparison, trained


def test_given_weights_stand_beside_what_became_of_them(compared_further):
    _, comparison, _ = compared_further
    features, tuned = (
        [row.name for row in comparison.rows if (row.knn_top1 is None) == trained]
        for trained in (False, True)
    )
    assert features == ["pretrained further", "given", "pretrained from scratch", "random init"]
    assert tuned == [*(f"{name}, fine-tuned" for name in features[:-1]), "from scratch"]
    decisive = comparison.differences[0]
    assert (decisive.a, decisive.b) == (tuned[0], "given, fine-tuned")
    assert comparison.verdict == did_it_pay(decisive, wall_s=7200)


def test_each_is_fine_tuned_from_its_own_weights(compared_further):
    nets, _, trained = compared_further
    for place, path in enumerate((nets.pretrained, nets.given, nets.from_scratch)):
        for start in trained[2 * place : 2 * place + 2]:
            assert torch.equal(start, next(load_model(path)[0].parameters()))


def test_given_weights_are_written_as_they_are(compared_further):
    nets = compared_further[0]
    given, written = (
        load_file(nets.given.with_suffix(".safetensors")),
        load_file(nets.given / "weights.safetensors"),
    )
    assert set(given) - set(written) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(tensor, given[name]) for name, tensor in written.items())
    assert ModelDir(nets.given).read().origin == "given"


@pytest.mark.parametrize(
    ("ours", "wall_s", "words"),
    [
        ([52, 63, 71], 12_240, "further pretraining gained 2.0 points [2.0, 2.0] for 3.4 hours"),
        ([52, 60, 71], 90, "weights: whether pretraining pays is not resolved (1.0 points [-"),
        ([48, 59, 67], 30, "did not pay (-2.0 points [-2.0, -2.0] for 30.0 seconds)"),
    ],
)
def test_the_verdict_says_what_was_gained_and_what_it_cost(ours, wall_s, words):
    assert words in did_it_pay(difference("a", "b", ours, [50, 61, 69]), wall_s=wall_s)


# --- differences ---


def test_difference_is_taken_draw_by_draw():
    """Draws vary by 20 points; in pairs the difference is steady."""
    found = difference("a", "b", [50, 60, 70], [48, 59, 67])
    assert found.mean == pytest.approx(2)
    assert found.ci95 == pytest.approx(list(mean_interval([2, 1, 3])))
    assert difference("a", "b", [50, 60, 70], [49, 62, 66]).resolved is False
    assert difference("a", "b", [50, 60], [50, 60]).resolved is False
