"""How good a frozen net's features are: nearest neighbors, a linear probe, and a linear probe on few labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from torch import Tensor, nn

from edgecl.data.loading import normalize
from edgecl.evaluate.cost import forward_cost
from edgecl.evaluate.inspection import inspect
from edgecl.evaluate.labelled import Labelled, draw_few, read_labelled
from edgecl.metrics.collapse import extract_features, knn_top1
from edgecl.metrics.intervals import mean_interval, proportion_interval
from edgecl.metrics.linear import LinearClassifier, fit_linear
from edgecl.nets.backbone import count_parameters
from edgecl.nets.model_dir import create_blank, load_backbone, load_model
from edgecl.progress import Progress
from edgecl.storage.directories import ModelDir
from edgecl.storage.record_files import write_record
from edgecl.storage.records import FewLabelAccuracy, ModelRecord, Preprocessing, ProbedNet, ProbeRecord

DEFAULT_LABELS_PER_CLASS = 10


def probe(
    model: Path,
    *,
    data: str,
    test: str | None = None,
    labels_per_class: int | None = None,
    seeds: int = 3,
    download: bool = False,
) -> ProbeRecord:
    """Evaluate the features of a model directory, of a fine-tuned net below its classifier, and write probe.json.

    `edgecl.api.probe` says what the arguments are and what is raised.
    """
    (result,) = probe_all(
        [model], data=data, test=test, labels_per_class=labels_per_class, seeds=seeds, download=download
    )
    return result


def probe_all(
    models: Sequence[Path],
    *,
    data: str,
    test: str | None = None,
    labels_per_class: int | None = None,
    seeds: int = 3,
    download: bool = False,
) -> list[ProbeRecord]:
    """Evaluate several model directories on the same images and label draws; arguments and errors as for probe."""
    labelled: Labelled | None = None
    preprocessing: Preprocessing | None = None
    results = []
    for model in models:
        wanted = ModelDir(model).read().preprocessing
        # Read again only for a net with another preprocessing.
        if labelled is None or wanted != preprocessing:
            preprocessing = wanted
            labelled = read_labelled(data, test=test, preprocessing=wanted, download=download)
        per_class = labels_per_class or DEFAULT_LABELS_PER_CLASS
        results.append(write_probe(model, labelled, labels_per_class=per_class, draws=seeds))
    return results


def side_by_side(models: Sequence[Path], records: Sequence[ProbeRecord]) -> list[ProbedNet]:
    """Set the probes of several nets beside what each net costs."""
    rows = []
    for model, record in zip(models, records, strict=True):
        net, about = load_feature_net(model)
        size = about.preprocessing.image_size
        rows.append(
            ProbedNet(
                model=str(model),
                width=about.width,
                params=count_parameters(net),
                macs=forward_cost(net, (1, 3, size, size)).macs,
                made_from=about.made_from,
                probe=record,
            )
        )
    return sorted(rows, key=lambda row: row.macs)


def write_probe(model: Path, labelled: Labelled, *, labels_per_class: int, draws: int) -> ProbeRecord:
    """Evaluate a model directory's net on images prepared for it, and write probe.json into it.

    Of a net without a classifier also inspection.json: what the linear probe confuses.
    """
    net, record = load_feature_net(model)
    files = ModelDir(model)
    found = probe_net(
        net,
        labelled,
        preprocessing=record.preprocessing,
        labels_per_class=labels_per_class,
        draws=draws,
        made_from=files.sha256,
    )
    if not record.classes:
        inspection = inspect(
            found.features,
            found.linear.logits(found.features),
            labelled,
            predicted_by="linear probe",
            made_from=files.sha256,
        )
        write_record(files.inspection_file, inspection)
    return write_record(files.probe_file, found.record)


class Probed(NamedTuple):
    """What a probe found, and with what."""

    record: ProbeRecord
    features: Tensor
    """(N, F) of the held-out images."""
    linear: LinearClassifier
    """On all labels."""


def load_feature_net(model: Path) -> tuple[nn.Module, ModelRecord]:
    """Rebuild a model directory's net without its classifier.

    Raises:
        ArtifactError: not a model directory.
    """
    net, record = load_model(model)
    if not record.classes:
        return net, record
    backbone = create_blank(record, classes=0)
    load_backbone(backbone, net)
    return backbone.eval(), record


def probe_net(
    net: nn.Module,
    labelled: Labelled,
    *,
    preprocessing: Preprocessing,
    labels_per_class: int,
    draws: int,
    made_from: str | None,
) -> Probed:
    """Evaluate the features of a net.

    Args:
        net: (N, 3, H, W) -> (N, F).
        made_from: for the record, the hash of the net's.
    """

    def prepare(images: Tensor) -> Tensor:
        return normalize(images, preprocessing.mean, preprocessing.std)

    train, test = labelled.train, labelled.test
    classes = len(labelled.classes)
    # Fails early where a class has too few labels.
    draw_few(train.labels, per_class=labels_per_class, draw=0)
    with Progress("probe", total=draws + 3, unit="fits") as progress:
        train_features = extract_features(net, train.images, normalize=prepare)
        test_features = extract_features(net, test.images, normalize=prepare)
        progress.advance(note="features")
        knn = knn_top1(train_features, train.labels, test_features, test.labels)
        progress.advance(note="nearest neighbors")
        classifier = fit_linear(train_features, train.labels, classes=classes)
        linear = classifier.top1(test_features, test.labels)
        progress.advance(note="linear probe")
        few = []
        for draw in range(draws):
            chosen = draw_few(train.labels, per_class=labels_per_class, draw=draw)
            fitted = fit_linear(train_features[chosen], train.labels[chosen], classes=classes)
            few.append(fitted.top1(test_features, test.labels))
            progress.advance(note=f"few-label draw {draw + 1}")
    record = ProbeRecord(
        made_from=made_from,
        knn_top1=knn,
        knn_ci95=list(proportion_interval(knn, len(test))),
        linear_top1=linear,
        linear_ci95=list(proportion_interval(linear, len(test))),
        few_label_top1=summary(few, labels_per_class=labels_per_class),
        n_test=len(test),
        n_train=len(train),
        classes=classes,
        data=labelled.train_from,
        test=labelled.test_from,
    )
    return Probed(record, test_features, classifier)


def summary(draws: Sequence[float], *, labels_per_class: int) -> FewLabelAccuracy:
    """Return mean, standard deviation and 95 % interval of accuracies over label draws; one draw has no interval."""
    several = len(draws) > 1
    return FewLabelAccuracy(
        mean=mean(draws),
        std=stdev(draws) if several else 0.0,
        # The t-interval of few draws can leave 0 to 100.
        ci95=[min(max(end, 0.0), 100.0) for end in mean_interval(draws)] if several else None,
        draws=list(draws),
        labels_per_class=labels_per_class,
    )
