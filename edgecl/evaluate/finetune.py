"""Give a net a classifier and train it with labels: a model directory that can be deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgecl.artifacts import ModelDir, record_header, refuse_existing, write_json
from edgecl.data.sources import absolute_uri
from edgecl.errors import RecipeError
from edgecl.evaluate.intervals import proportion_interval
from edgecl.evaluate.labelled import read_labelled
from edgecl.evaluate.supervised import Supervision, classifier_top1, train_classifier
from edgecl.nets.carving import create_blank, load_backbone, load_model, write_model
from edgecl.settings import override, validate

DEFAULT_EPOCHS = 20


def finetune(
    model: Path,
    *,
    data: str,
    out: Path,
    test: str | None = None,
    epochs: int | None = None,
    assignments: list[str] | None = None,
    force: bool = False,
    download: bool = False,
) -> dict[str, Any]:
    """Add a classifier to a model directory's net, train both, and write a new model directory.

    Args:
        model: a model directory.
        data: a data URI with labels.
        out: the model directory to write.
        test: a data URI with labels, held out; None takes the data set's own test split or holds out a fifth.
        epochs: passes over the data; None takes 20.
        assignments: `KEY=VALUE` of Supervision.
        force: replace an earlier model directory.
        download: let torchvision fetch what is not on the disk.

    Returns:
        the record in model.json, with the accuracy under "evaluation".

    Raises:
        ArtifactError: not a model directory, or the output exists.
        DataError: no labels.
        RecipeError: unknown key or value.
    """
    settings = validate(
        Supervision,
        override({}, assignments or [], error=RecipeError),
        source="--set",
        error=RecipeError,
    )
    refuse_existing(out, force=force, kind=ModelDir.KIND)
    pretrained, record = load_model(model)
    preprocessing = record["preprocessing"]
    labelled = read_labelled(data, test=test, preprocessing=preprocessing, download=download)
    torch.manual_seed(settings.seed)
    net = create_blank({**record, "classes": list(labelled.classes)})
    load_backbone(net, pretrained)
    batch = min(settings.batch_size, len(labelled.train))
    train_classifier(
        net,
        labelled.train,
        steps=(epochs or DEFAULT_EPOCHS) * max(1, len(labelled.train) // batch),
        settings=settings,
        preprocessing=preprocessing,
        what="finetune",
    )
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
        force=force,
    )
    evaluation = {
        **record_header("evaluation", made_from=ModelDir(out).sha256),
        "top1": top1,
        "top1_ci95": list(proportion_interval(top1, len(labelled.test))),
        "n_test": len(labelled.test),
        "n_train": len(labelled.train),
        "data": labelled.train_from,
        "test": labelled.test_from,
        "epochs": epochs or DEFAULT_EPOCHS,
        "settings": settings.model_dump(mode="json"),
    }
    write_json(ModelDir(out).evaluation_file, evaluation)
    return {**written, "evaluation": evaluation}
