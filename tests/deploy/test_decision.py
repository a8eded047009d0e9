"""The decision: losses, the search for nodes to keep, and what it says in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgecl.config.target import Quantization
from edgecl.deploy.accuracy import Evaluator, Outputs
from edgecl.deploy.decision import conclude, measure_loss, search_int8, unevaluated
from edgecl.storage.records import Preprocessing, Speed

CLASSES = 4
PREPROCESSING = Preprocessing(image_size=2, resize_size=2, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])


def evaluator(count=400, metric="top1"):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 2, 2), generator=draw, dtype=torch.uint8)
    labels = torch.from_numpy(clean(images.float().div(255).numpy()).argmax(1))
    return Evaluator(
        metric, images, None if metric == "mean_cosine" else labels, None, None, PREPROCESSING, "test"
    )


def clean(images):
    """Logits of a linear net that is always right, by the definition of the labels."""
    weight = np.random.default_rng(1).normal(size=(12, CLASSES))
    return (images.reshape(len(images), -1) - 0.5) @ weight


class Net:
    """A net of so many nodes, of which some do damage when they are quantized; a model is the set of kept nodes."""

    def __init__(self, harm):
        self.harm = harm
        self.names = list(harm)

    def quantize(self, kept):
        return frozenset(kept)

    def open_run(self, kept):
        def run(images):
            noise = np.zeros((len(images), CLASSES))
            for place, (name, strength) in enumerate(self.harm.items()):
                if name not in kept:
                    # A function of the image, so that every run gives the same.
                    angle = 1e3 * images.reshape(len(images), -1).sum(1, keepdims=True) * (place + 1)
                    noise += strength * np.sin(angle + np.arange(CLASSES))
            return (clean(images) + noise).astype(np.float32)

        return run

    def search(self, evaluator, **settings):
        told = []
        model, decision = search_int8(
            self.quantize,
            self.names,
            evaluator=evaluator,
            fp32=self.open_run(set(self.names)),
            open_run=self.open_run,
            settings=Quantization(**settings),
            features=evaluator.metric != "top1",
            say=told.append,
        )
        return model, decision, told


def test_loss_and_its_interval_are_those_of_the_paired_differences():
    images = evaluator(200)
    right = Outputs(torch.nn.functional.one_hot(images.labels, CLASSES).float(), None)
    wrong = right.queries.clone()
    wrong[:30] = wrong[:30].roll(1, dims=1)
    loss = measure_loss(images, Outputs(wrong, None), right)
    lost = np.zeros(200)
    lost[:30] = 100
    half = 1.96 * lost.std(ddof=1) / np.sqrt(200)
    assert loss.points == pytest.approx(15)
    assert loss.ci95 == pytest.approx((15 - half, 15 + half))
    assert loss.cosine == pytest.approx(170 / 200)


def test_search_finds_the_smallest_set_of_nodes_that_do_the_damage():
    harm = {f"conv{place}": 0.0 for place in range(40)} | {"conv7": 3.0, "conv20": 2.0, "conv33": 4.0}
    net = Net(harm)
    model, decision, _ = net.search(evaluator())
    assert decision.kept is True
    assert decision.kept_nodes == ["conv33", "conv7", "conv20"], "the worst first"
    assert model == {"conv7", "conv20", "conv33"}
    assert len(decision.tried) <= 8, "bisection, not one after another"


def test_net_beyond_saving_is_rejected():
    net = Net({f"conv{place}": 2.0 for place in range(10)})
    _, decision, _ = net.search(evaluator(), max_kept_fraction=0.3)
    assert decision.kept is False
    assert decision.loss_points > 5
    assert decision.kept_nodes == []


def test_loss_is_reported_on_images_the_search_did_not_see():
    images = evaluator(401)
    search, report = images.halves()
    together = torch.cat([search.images, report.images]).flatten(1)
    assert len(search) == 200
    assert len(report) == 201
    assert len(torch.unique(together, dim=0)) == len(torch.unique(images.images.flatten(1), dim=0))
    _, decision, _ = Net({"conv": 0.0}).search(images)
    assert (decision.searched_on, decision.images) == (200, 201)


def test_features_are_held_to_their_similarity():
    strict, loose = (
        Net({"conv": 0.5}).search(evaluator(metric="mean_cosine"), min_cosine=cosine, max_kept_fraction=0)[1]
        for cosine in (0.9999, 0.5)
    )
    assert (strict.kept, loose.kept) == (False, True)
    assert strict.loss_points is None
    assert 0.5 < strict.mean_cosine < 0.9999


def decision_of(net, **more):
    return net.search(evaluator(), **more)[1]


GOOD = Net({"conv": 0.0})
BAD = Net({f"conv{place}": 2.0 for place in range(10)})
NONE_KEPT = {"max_kept_fraction": 0.0}
FREE = "0.00 points of top-1 lost [0.00, 0.00], 1 allowed (on 200 images)"


@pytest.mark.parametrize(
    ("net", "settings", "changes", "speed", "words"),
    [
        (GOOD, {}, {}, Speed(against="fp32", ratio=1.5), f"kept: {FREE}, for +50 % speed against fp32"),
        (
            *(GOOD, {}, {"loss_points": -4.35, "loss_ci95": [-8.81, 0.11]}, None),
            "kept: 4.35 points of top-1 gained [-0.11, 8.81], a loss of 1 allowed (on 200 images), for ",
        ),
        (
            Net({**dict.fromkeys("abcdefghi", 0.0), "bad": 4.0}),
            {},
            {},
            None,
            "kept with 1 of 10 nodes in fp16: ",
        ),
        (
            *(GOOD, {}, {}, Speed(against="fp32", ratio=0.8, threads=1)),
            "rejected because it is slower: -20 % speed against fp32 with 1 thread; ",
        ),
        (BAD, NONE_KEPT, {}, None, "rejected because it costs too much: "),
        (
            *(BAD, NONE_KEPT, {}, Speed(against="fp16", ratio=1.4)),
            "for +40 % speed against fp16; `edgecl finetune --quantize int8`",
        ),
        (BAD, NONE_KEPT, {"trained_for_int8": True}, None, "measured here; it was trained for INT8 already"),
    ],
    ids=["kept", "gain", "nodes", "slower", "costly", "way out", "trained"],
)
def test_words_name_what_was_decided_loss_budget_and_speed(net, settings, changes, speed, words):
    decision = decision_of(net, **settings).model_copy(update=changes)
    found = conclude(decision, speed=speed, higher="fp16")
    assert words in found.words
    assert found.kept is found.words.startswith("kept")


def test_net_whose_outputs_left_the_tolerance_is_rejected_for_that():
    outside = {"kept": False, "outside_tolerance": ["the top-1 agreement is 0.4, required is 0.5"]}
    measured, unmeasured = (
        conclude(decision.model_copy(update=outside), speed=None, higher="fp32")
        for decision in (decision_of(Net({"conv": 0.0})), unevaluated("no images"))
    )
    reason = (
        "rejected because its outputs are too far from fp32's: the top-1 agreement is 0.4, required is 0.5; "
    )
    assert measured.words.startswith(
        f"{reason}0.00 points of top-1 lost [0.00, 0.00], 1 allowed (on 200 images)"
    )
    assert unmeasured.words.startswith(f"{reason}not evaluated: no images")
    assert not measured.kept


def test_decision_whose_interval_crosses_the_budget_says_so():
    net = Net({"conv": 1.2})
    decision = net.search(
        evaluator(), max_loss_points=net.search(evaluator())[1].loss_points + 0.1, max_kept_fraction=0
    )[1]
    assert "(more images would tell better)" in conclude(decision, speed=None, higher="fp16").words


def test_unevaluated_net_stays_unevaluated_whatever_its_speed():
    found = conclude(unevaluated("no images"), speed=Speed(against="fp32", ratio=2.0), higher="fp32")
    assert (found.kept, found.words) == (False, "not evaluated: no images")
