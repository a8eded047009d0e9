"""The verb `finetune`: a model directory and labelled images in, a model directory with a classifier out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from edgecl.config.settings import override, validate
from edgecl.data.loading import normalize
from edgecl.data.sources import absolute_uri
from edgecl.errors import ArtifactError, DataError, RecipeError, first_of
from edgecl.evaluate.inspection import inspect
from edgecl.evaluate.labelled import Labelled, read_labelled
from edgecl.evaluate.probe import load_feature_net
from edgecl.evaluate.supervised import (
    FinetuneConfig,
    QuantizedFinetuneConfig,
    accuracies,
    classifier_logits,
    steps_per_epoch,
    train_classifier,
)
from edgecl.metrics.collapse import extract_features
from edgecl.metrics.intervals import mean_interval, proportion_interval
from edgecl.metrics.label_sets import mean_average_precision
from edgecl.nets.backbone import taking_pictures
from edgecl.nets.fake_quant import learning_scales, quantize_net
from edgecl.nets.model_dir import create_blank, load_backbone, load_model, write_model
from edgecl.storage.directories import ModelDir
from edgecl.storage.outputs import refuse_existing, refuse_own_input
from edgecl.storage.record_files import write_record
from edgecl.storage.records import EvaluationRecord, FinetunedModel, ModelRecord, Quantization

DEFAULT_EPOCHS = 20
DEFAULT_QUANTIZED_EPOCHS = 3
# Spread over the images to learn from.
CALIBRATION_IMAGES = 512


def finetune(
    model: Path,
    *,
    data: str,
    out: Path,
    test: str | None = None,
    epochs: int | None = None,
    quantize: str | None = None,
    assignments: list[str] | None = None,
    force: bool = False,
    download: bool = False,
) -> FinetunedModel:
    """Add a classifier to a model directory's net, train both, and write a new model directory.

    With `quantize` the net is trained as the int8 net it will be: batch norms folded, everything a convolution reads
    rounded to int8. A classifier that the net has is kept; a net without one first gets it, by this function's own
    defaults, and `epochs` and `assignments` are of the quantized part.

    `edgecl.api.finetune` says what the arguments are and what is raised.
    """
    if quantize not in (None, "int8"):
        raise RecipeError(f"cannot quantize to '{quantize}'", hint="the one precision to train for is int8")
    assignments = assignments or []
    settings: FinetuneConfig = validate(
        QuantizedFinetuneConfig if quantize else FinetuneConfig,
        override({}, assignments, error=RecipeError),
        source="--set",
        error=RecipeError,
        assignments=assignments,
    )
    refuse_own_input(out, model)
    refuse_existing(out, force=force, kind=ModelDir.KIND)
    net, record = load_model(model)
    if record.quantization:
        raise ArtifactError(
            "this net is quantized already",
            where={"model": model},
            hint="start from the float net that it was made from",
        )
    deployed = settings.deployed(record.preprocessing)
    size, hint = deployed.image_size, "leave test_size out, or set one that the net takes"
    with taking_pictures(f"'{record.arch}'", size, size, hint=hint), torch.no_grad():
        net(torch.zeros(1, 3, size, size))
    labelled = read_labelled(
        data, test=test, preprocessing=record.preprocessing, download=download, label_sets=True
    )
    if deployed != record.preprocessing:
        larger = read_labelled(data, test=test, preprocessing=deployed, download=download, label_sets=True)
        labelled = replace(labelled, test=larger.test)
    torch.manual_seed(settings.seed)
    trained = (
        _train_quantized(net, record, labelled, epochs=epochs, settings=settings, model=model, data=data)
        if isinstance(settings, QuantizedFinetuneConfig)
        else _train_float(net, record, labelled, epochs=epochs, settings=settings)
    )
    written = write_model(
        out,
        trained.net,
        arch=record.arch,
        width=record.width,
        stem_stride=record.stem_stride,
        classes=list(labelled.classes),
        preprocessing=deployed,
        origin="finetuned",
        made_from=ModelDir(model).sha256,
        data=absolute_uri(data),
        recipe_name=record.recipe_name,
        method=record.method,
        quantization=trained.quantization,
        label_sets=labelled.test.labels.ndim == 2,
        force=force,
    )
    logits = classifier_logits(trained.net, labelled.test, deployed)
    evaluation = _evaluation(
        trained,
        logits,
        labelled,
        settings=settings,
        test=test,
        made_from=ModelDir(out).sha256,
    )
    write_record(ModelDir(out).evaluation_file, evaluation)
    if labelled.test.labels.ndim == 1:
        _write_inspection(out, logits, labelled)
    return FinetunedModel(**dict(written), evaluation=evaluation)


@dataclass(frozen=True)
class _Trained:
    """A fine-tuned net with its classifier."""

    net: nn.Module
    epochs: int
    quantization: Quantization | None = None
    before: tuple[Tensor, Tensor] | None = None
    """Of a net trained for INT8, the (N,) accuracies in float and calibrated, before it was trained so, percent."""


def _train_float(
    net: nn.Module, record: ModelRecord, labelled: Labelled, *, epochs: int | None, settings: FinetuneConfig
) -> _Trained:
    """Add a new classifier to the net and train both."""
    per_epoch = steps_per_epoch(labelled.train, settings)
    classifier = create_blank(record, classes=len(labelled.classes))
    load_backbone(classifier, net)
    taken = train_classifier(
        classifier,
        labelled.train,
        steps=(epochs or DEFAULT_EPOCHS) * per_epoch,
        settings=settings,
        preprocessing=record.preprocessing,
        what="finetune",
    )
    return _Trained(classifier, round(taken / per_epoch))


def _train_quantized(
    net: nn.Module,
    record: ModelRecord,
    labelled: Labelled,
    *,
    epochs: int | None,
    settings: QuantizedFinetuneConfig,
    model: Path,
    data: str,
) -> _Trained:
    """Quantize a classifier, which a net without one gets first, and train it so."""
    if not record.classes:
        plain = FinetuneConfig(seed=settings.seed, device=settings.device)
        net = _train_float(net, record, labelled, epochs=None, settings=plain).net
    elif record.classes != list(labelled.classes):
        raise DataError(
            f"the net tells other classes apart: {first_of(record.classes)} against {first_of(labelled.classes)}",
            where={"model": model, "data": data},
            hint="fine-tune to these classes without --quantize first",
        )
    preprocessing = record.preprocessing
    images = labelled.train.images[:: max(1, len(labelled.train) // CALIBRATION_IMAGES)][:CALIBRATION_IMAGES]
    quantized, kept = quantize_net(
        net, normalize(images, preprocessing.mean, preprocessing.std), keep=settings.keep
    )
    deployed = settings.deployed(preprocessing)
    before = (
        accuracies(classifier_logits(net, labelled.test, deployed), labelled.test),
        accuracies(classifier_logits(quantized, labelled.test, deployed), labelled.test),
    )
    per_epoch = steps_per_epoch(labelled.train, settings)
    with learning_scales(quantized) if settings.learn_scales else contextlib.nullcontext():
        taken = train_classifier(
            quantized,
            labelled.train,
            steps=(epochs or DEFAULT_QUANTIZED_EPOCHS) * per_epoch,
            settings=settings,
            preprocessing=preprocessing,
            what="finetune int8",
        )
    quantization = Quantization(keep=kept, learnt=settings.learn_scales)
    return _Trained(quantized, round(taken / per_epoch), quantization, before)


def _write_inspection(model: Path, logits: Tensor, labelled: Labelled) -> None:
    """Write what the classifier confuses beside a fine-tuned net."""
    net, record = load_feature_net(model)
    images = record.preprocessing
    features = extract_features(
        net, labelled.test.images, normalize=lambda part: normalize(part, images.mean, images.std)
    )
    inspection = inspect(
        features,
        logits,
        labelled,
        predicted_by="classifier",
        made_from=ModelDir(model).sha256,
    )
    write_record(ModelDir(model).inspection_file, inspection)


def _evaluation(
    trained: _Trained,
    logits: Tensor,
    labelled: Labelled,
    *,
    settings: FinetuneConfig,
    test: str | None,
    made_from: str,
) -> EvaluationRecord:
    sets = labelled.test.labels.ndim == 2

    def summed(found: Tensor | None) -> tuple[float, list[float]] | tuple[None, None]:
        """Return the mean of what each image gives, and its interval."""
        if found is None:
            return None, None
        mean = float(found.mean())
        # The F1 of an image is no yes or no.
        low, high = mean_interval(found.tolist()) if sets else proportion_interval(mean, len(found))
        return mean, [max(low, 0.0), min(high, 100.0)]

    top1, top1_ci95 = summed(accuracies(logits, labelled.test))
    assert top1 is not None
    assert top1_ci95 is not None
    (in_float, float_ci95), (calibrated, calibrated_ci95) = map(summed, trained.before or (None, None))
    return EvaluationRecord(
        made_from=made_from,
        metric="f1" if sets else "top1",
        top1=top1,
        top1_ci95=top1_ci95,
        mean_average_precision=100 * mean_average_precision(logits, labelled.test.labels) if sets else None,
        float_top1=in_float,
        float_top1_ci95=float_ci95,
        calibrated_top1=calibrated,
        calibrated_top1_ci95=calibrated_ci95,
        n_test=len(labelled.test),
        n_train=len(labelled.train),
        data=labelled.train_from,
        test=labelled.test_from,
        test_uri=absolute_uri(test) if test else None,
        epochs=trained.epochs,
        settings=settings.model_dump(mode="json"),
    )
