"""Give a net a classifier and train it with labels: a model directory that can be deployed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgecl.config.settings import override, validate
from edgecl.data.loading import normalize
from edgecl.data.sources import absolute_uri
from edgecl.errors import ArtifactError, DataError, RecipeError
from edgecl.evaluate.labelled import Labelled, Part, read_labelled
from edgecl.evaluate.supervised import (
    FinetuneConfig,
    QuantizedFinetuneConfig,
    classifier_top1,
    train_classifier,
)
from edgecl.metrics.intervals import proportion_interval
from edgecl.nets.carving import create_blank, load_backbone, load_model, write_model
from edgecl.nets.fake_quant import learning_scales, quantize_net
from edgecl.storage.artifacts import ModelDir, record_header, refuse_existing, refuse_own_input, write_json

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
) -> dict[str, Any]:
    """Add a classifier to a model directory's net, train both, and write a new model directory.

    With `quantize` the net is trained as the int8 net it will be: batch norms folded, everything a convolution reads
    rounded to int8. A classifier that the net has is kept; a net without one first gets it, by this function's own
    defaults, and `epochs` and `assignments` are of the quantized part.

    Args:
        model: a model directory.
        data: a data URI with labels.
        out: the model directory to write.
        test: a data URI with labels, held out; None takes the data set's own test split or holds out a fifth.
        epochs: passes over the data; None takes 20, or 3 with `quantize`.
        quantize: "int8", or None to train in float.
        assignments: `KEY=VALUE` of FinetuneConfig, with `quantize` of QuantizedFinetuneConfig.
        force: replace an earlier model directory.
        download: let torchvision fetch what is not on the disk.

    Returns:
        the record in model.json, with the accuracy under "evaluation".

    Raises:
        ArtifactError: not a model directory, a net that is quantized already, or the output exists.
        DataError: no labels, or other classes than those of the classifier to quantize.
        RecipeError: unknown key or value, or a net that cannot be quantized.
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
    if record.get("quantization"):
        raise ArtifactError(
            "this net is quantized already",
            where={"model": model},
            hint="start from the float net that it was made from",
        )
    preprocessing = record["preprocessing"]
    labelled = read_labelled(data, test=test, preprocessing=preprocessing, download=download)
    torch.manual_seed(settings.seed)
    quantized: dict[str, Any] = {}
    if isinstance(settings, QuantizedFinetuneConfig):
        epochs = epochs or DEFAULT_QUANTIZED_EPOCHS
        if not record["classes"]:
            plain = FinetuneConfig(seed=settings.seed, device=settings.device)
            net = _with_classifier(net, record, labelled, epochs=DEFAULT_EPOCHS, settings=plain)
        elif record["classes"] != list(labelled.classes):
            raise DataError(
                f"the net tells other classes apart: {_few(record['classes'])} against {_few(labelled.classes)}",
                where={"model": model, "data": data},
                hint="fine-tune to these classes without --quantize first",
            )
        net, quantized = _quantized(net, labelled, preprocessing, epochs=epochs, settings=settings)
    else:
        epochs = epochs or DEFAULT_EPOCHS
        net = _with_classifier(net, record, labelled, epochs=epochs, settings=settings)
    top1 = classifier_top1(net, labelled.test, preprocessing)
    written = write_model(
        out,
        net,
        arch=record["arch"],
        width=record["width"],
        stem_stride=record["stem_stride"],
        classes=list(labelled.classes),
        preprocessing=preprocessing,
        origin="finetuned",
        made_from=ModelDir(model).sha256,
        data=absolute_uri(data),
        recipe_name=record["recipe_name"],
        arm=record["arm"],
        quantization=quantized.pop("quantization", None),
        force=force,
    )
    evaluation = {
        **record_header("evaluation", made_from=ModelDir(out).sha256),
        "top1": top1,
        "top1_ci95": list(proportion_interval(top1, len(labelled.test))),
        **quantized,
        "n_test": len(labelled.test),
        "n_train": len(labelled.train),
        "data": labelled.train_from,
        "test": labelled.test_from,
        "test_uri": absolute_uri(test) if test else None,
        "epochs": epochs,
        "settings": settings.model_dump(mode="json"),
    }
    write_json(ModelDir(out).evaluation_file, evaluation)
    return {**written, "evaluation": evaluation}


def _with_classifier(
    pretrained: nn.Module,
    record: dict[str, Any],
    labelled: Labelled,
    *,
    epochs: int,
    settings: FinetuneConfig,
) -> nn.Module:
    """Return the net with a new classifier, both trained."""
    net = create_blank({**record, "classes": list(labelled.classes)})
    load_backbone(net, pretrained)
    train_classifier(
        net,
        labelled.train,
        steps=_steps(epochs, labelled.train, settings),
        settings=settings,
        preprocessing=record["preprocessing"],
        what="finetune",
    )
    return net


def _quantized(
    net: nn.Module,
    labelled: Labelled,
    preprocessing: dict[str, Any],
    *,
    epochs: int,
    settings: QuantizedFinetuneConfig,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the net quantized and trained on, and what the records say of it."""
    images = labelled.train.images[:: max(1, len(labelled.train) // CALIBRATION_IMAGES)][:CALIBRATION_IMAGES]
    quantized, kept = quantize_net(
        net, normalize(images, preprocessing["mean"], preprocessing["std"]), keep=settings.keep
    )
    before = {
        "float": classifier_top1(net, labelled.test, preprocessing),
        "calibrated": classifier_top1(quantized, labelled.test, preprocessing),
    }
    with learning_scales(quantized) if settings.learn_scales else contextlib.nullcontext():
        train_classifier(
            quantized,
            labelled.train,
            steps=_steps(epochs, labelled.train, settings),
            settings=settings,
            preprocessing=preprocessing,
            what="finetune int8",
        )
    return quantized, {
        "quantization": {"precision": "int8", "keep": kept, "learnt": settings.learn_scales},
        **{f"{state}_top1": top1 for state, top1 in before.items()},
        **{
            f"{state}_top1_ci95": list(proportion_interval(top1, len(labelled.test)))
            for state, top1 in before.items()
        },
    }


def _steps(epochs: int, part: Part, settings: FinetuneConfig) -> int:
    return epochs * max(1, len(part) // min(settings.batch_size, len(part)))


def _few(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
