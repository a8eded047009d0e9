"""Training a classifier: it learns, it freezes what it is told to, and it is a function of its seed."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

import edgecl.evaluate.finetune
import edgecl.evaluate.supervised
from edgecl.config.views import Views
from edgecl.data.loading import normalize
from edgecl.errors import DeviceError, NonFiniteError
from edgecl.evaluate.labelled import Part
from edgecl.evaluate.supervised import (
    FinetuneConfig,
    QuantizedFinetuneConfig,
    accuracies,
    choose_device,
    class_weights,
    classifier_accuracy,
    classifier_logits,
    hold_out,
    train_classifier,
)
from edgecl.nets.fake_quant import FakeQuant, learning_scales, quantize_net


@pytest.fixture
def train(tiny_net, colored, preprocessing):
    def train(net=tiny_net, *, steps=20, part=colored.train, views=None, **settings):
        train_classifier(
            net,
            part,
            steps=steps,
            settings=FinetuneConfig(**{"lr": 0.02, "batch_size": 12, "device": "cpu", **settings}),
            preprocessing=preprocessing,
            what="test",
            views=views,
        )
        return net

    return train


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module, before):
    return [name for name, value in module.state_dict().items() if torch.equal(value, before[name])]


def test_separable_classes_are_learned(train, colored, preprocessing):
    assert classifier_accuracy(train(steps=40), colored.test, preprocessing) == 100


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_are_nothing_to_warn_of(train, caplog, steps):
    train(steps=steps)
    assert caplog.text == ""


def test_backbone_learns_more_slowly_at_a_smaller_fraction(train, tiny_net):
    before = copied(tiny_net)
    moved = []
    for fraction in (1.0, 0.01):
        tiny_net.load_state_dict(before)
        train(steps=4, backbone_lr_fraction=fraction)
        weight = tiny_net.state_dict()["backbone.0.weight"]
        moved.append(float((weight - before["backbone.0.weight"]).abs().mean()))
    assert moved[1] < 0.05 * moved[0]


def test_same_seed_gives_the_same_net_to_the_bit(train, tiny_net):
    before = copied(tiny_net)
    first = copied(train(steps=3))
    tiny_net.load_state_dict(before)
    assert unchanged(train(steps=3), first) == list(first)


@pytest.fixture
def drawn(monkeypatch):
    """The pictures of each batch, and how its views are drawn."""
    seen = []
    draw = edgecl.evaluate.supervised.draw_parameters

    def watching(index, sizes, spec, **options):
        seen.append((sorted(index.tolist()), spec))
        return draw(index, sizes, spec, **options)

    monkeypatch.setattr(edgecl.evaluate.supervised, "draw_parameters", watching)
    return seen


def test_every_picture_is_seen_in_every_epoch(train, drawn):
    train(steps=6, batch_size=12)
    seen = [pictures for pictures, _ in drawn]
    for epoch in (seen[:3], seen[3:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(36))
    assert seen[:3] != seen[3:]


def test_loss_that_is_no_number_stops_with_a_named_error(train, tiny_net):
    with torch.no_grad():
        tiny_net.classifier.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 1(.|\n)*lower the rate"):
        train()


def test_cuda_that_is_not_there_is_a_named_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(DeviceError, match="no CUDA device is available"):
        choose_device("cuda")


def test_views_are_those_of_the_settings_unless_others_are_given(train, colored, drawn):
    train(steps=1, flip=0.125)
    spec = drawn[0][1]
    assert (spec.flip, spec.grayscale, spec.blur) == (0.125, 0, 0)
    train(steps=1, views=Views(flip=0.25))
    assert drawn[1][1] == Views(flip=0.25).specs(colored.train.images.shape[-1])[0]


# --- what timm's training has ---


@pytest.fixture
def after_each_step(monkeypatch, tiny_net):
    """The net's tensors after each of the optimizer's steps."""
    seen = []
    take = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (take(self), seen.append(copied(tiny_net)))[0]
    )
    return seen


def test_the_average_is_the_sum_of_all_weights_by_their_age(train, after_each_step):
    found = copied(train(steps=6, ema=0.75))
    for name in ("backbone.0.weight", "classifier.bias", "backbone.1.running_var"):
        expected = after_each_step[0][name].double()
        for tensors in after_each_step[1:]:
            expected = 0.75 * expected + 0.25 * tensors[name].double()
        torch.testing.assert_close(found[name].double(), expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(found["classifier.bias"], after_each_step[-1]["classifier.bias"])


def test_balanced_weights_are_those_of_the_loss(train, colored, monkeypatch):
    seen = []
    loss = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional,
        "cross_entropy",
        lambda *given, weight, **named: (seen.append(weight), loss(*given, weight=weight, **named))[1],
    )
    part = colored.train.take(torch.arange(len(colored.train))[colored.train.labels != 2])
    train(steps=1, part=part, class_weights="balanced")
    train(steps=1, part=part)
    assert torch.equal(seen[0], class_weights(part.labels, 3))
    # In inverse proportion to their number.
    weights = class_weights(torch.tensor([0] * 6 + [1] * 3 + [2]), 3)
    assert (weights * torch.tensor([6, 3, 1])).tolist() == pytest.approx([10 / 3] * 3)
    assert seen[1] is None


def test_it_stops_after_epochs_without_better_weights_and_keeps_the_best(
    train, tiny_net, colored, preprocessing, monkeypatch
):
    drawn = torch.Generator().manual_seed(0)
    part = Part(colored.train.images, colored.train.labels[torch.randperm(36, generator=drawn)])
    stay, held_out = hold_out(part, seed=0)
    assert sorted(stay.labels.tolist() + held_out.labels.tolist()) == sorted(part.labels.tolist())
    seen = []
    top1 = edgecl.evaluate.supervised.classifier_accuracy

    def watching(net, images, preparing):
        assert torch.equal(images.images, held_out.images)
        seen.append((top1(net, images, preparing), copied(net)))
        return seen[-1][0]

    monkeypatch.setattr(edgecl.evaluate.supervised, "classifier_accuracy", watching)
    settings = FinetuneConfig(lr=0.02, batch_size=12, device="cpu", early_stop=2)
    taken = train_classifier(tiny_net, part, steps=200, settings=settings, preprocessing=preprocessing)
    found = [value for value, _ in seen]
    best = found.index(max(found))
    assert len(found) == best + 3 == taken / (len(stay) // 12) < 100
    assert unchanged(tiny_net, seen[best][1]) == list(seen[best][1])


@pytest.fixture
def in_sets(colored):
    """The pictures to learn from, each of two classes: its color, and "dark" or not by a rule that its pixels show."""
    images = colored.train.images.clone()
    dark = torch.arange(len(images)) % 2 == 0
    images[dark] = images[dark] // 4
    colors = torch.nn.functional.one_hot(colored.train.labels, 3)
    return Part(images, torch.cat([colors[:, :2], dark[:, None]], 1).float())


def test_sets_of_classes_are_learned(train, tiny_net, in_sets, preprocessing):
    train(steps=400, part=in_sets, label_smoothing=0.0)
    found = accuracies(classifier_logits(tiny_net, in_sets, preprocessing), in_sets)
    assert float(found.mean()) > 95


def test_the_loss_of_sets_is_the_mean_of_a_binary_one_for_each_class(train, in_sets, monkeypatch):
    seen = []
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def watching(logits, targets, *, pos_weight):
        seen.append((loss(logits, targets, pos_weight=pos_weight), logits.detach(), targets, pos_weight))
        return seen[-1][0]

    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy_with_logits", watching)
    train(steps=1, part=in_sets, label_smoothing=0.2, class_weights="balanced")
    ((found, logits, targets, weights),) = seen
    assert targets.unique().tolist() == pytest.approx([0.1, 0.9])
    counts = in_sets.labels.sum(0)
    assert torch.equal(weights, (len(in_sets) - counts) / counts)
    chance = logits.sigmoid()
    expected = -(weights * targets * chance.log() + (1 - targets) * (1 - chance).log()).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("settings", [{"mixup": 0.5, "cutmix": 1.0}, {"rand_augment": 9}], ids=str)
def test_classes_are_learned_from_mixed_and_changed_pictures_too(train, colored, preprocessing, settings):
    assert classifier_accuracy(train(steps=60, **settings), colored.test, preprocessing) > 90


def test_no_setting_is_dead():
    modules = (edgecl.evaluate.supervised, edgecl.evaluate.finetune)
    code = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in modules)
    read = set(re.findall(r"(?<=settings\.)\w+|(?<=self\.)\w+", code))
    assert QuantizedFinetuneConfig.model_fields.keys() <= read


# --- training a quantized net ---


@pytest.fixture
def badly_calibrated(train, tiny_net, colored, preprocessing):
    """Make a quantized net that knew its classes until its int8 steps were so many times as wide."""

    def make(factor):
        train(steps=40)
        images = normalize(colored.train.images, preprocessing.mean, preprocessing.std)
        quantized, _ = quantize_net(tiny_net, images, keep=[])
        assert classifier_accuracy(quantized, colored.test, preprocessing) == 100
        for module in quantized.modules():
            if isinstance(module, FakeQuant):
                module.scale.mul_(factor)
        assert classifier_accuracy(quantized, colored.test, preprocessing) < 70
        return quantized

    return make


def test_learnt_scales_repair_steps_that_are_too_narrow(train, badly_calibrated, colored, preprocessing):
    """Which the weights alone cannot: nearly everything is clipped."""
    net = badly_calibrated(1 / 30)
    before = copied(net)
    fixed = copy.deepcopy(net)
    with learning_scales(net):
        train(net, steps=150)
    train(fixed, steps=150)
    assert classifier_accuracy(net, colored.test, preprocessing) == 100
    assert classifier_accuracy(fixed, colored.test, preprocessing) < 70
    assert unchanged(net, before) == []


def test_gradients_reach_the_weights_through_the_rounding(train, badly_calibrated, colored, preprocessing):
    net = badly_calibrated(200)
    before = copied(net)
    train(net, steps=150)
    assert classifier_accuracy(net, colored.test, preprocessing) == 100
    assert [name.rpartition(".")[2] for name in unchanged(net, before)] == ["scale"] * 4
