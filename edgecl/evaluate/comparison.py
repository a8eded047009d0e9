"""Is pretraining worth it? The pretrained net, the same net untrained, and the same net trained on the few labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import mean

import torch

from edgecl.config.recipe import Probe
from edgecl.config.views import Views
from edgecl.evaluate.few_labels import FewLabels, train_on_few
from edgecl.evaluate.labelled import Labelled, draw_few
from edgecl.evaluate.probe import summary, write_probe
from edgecl.evaluate.supervised import FinetuneConfig
from edgecl.metrics.intervals import mean_interval
from edgecl.nets.backbone import create_backbone
from edgecl.nets.model_dir import write_model
from edgecl.storage.directories import ModelDir
from edgecl.storage.records import ComparedRow, ComparisonRecord, Difference, ModelRecord, Scratch
from edgecl.train.carve import recalibrate_on


def write_random(
    out: Path, record: ModelRecord, labelled: Labelled, *, seed: int, force: bool = False
) -> None:
    """Write the same net at random initialization as a model directory, its norms recalibrated like the carved net's.

    Args:
        out: the model directory to write.
        record: of the net to be compared.
        labelled: its training images set the norms, as they did for the carved net.
        seed: of the initialization.
        force: replace an earlier model directory.
    """
    torch.manual_seed(seed)
    net = create_backbone(record.arch, width=record.width, stem_stride=record.stem_stride)
    recalibrate_on(net, labelled.train.images, record.preprocessing)
    write_model(
        out,
        net,
        arch=record.arch,
        width=record.width,
        stem_stride=record.stem_stride,
        classes=None,
        preprocessing=record.preprocessing,
        origin="random",
        made_from=None,
        data=record.data,
        recalibrated=True,
        recipe_name=record.recipe_name,
        force=force,
    )


def compare(
    pretrained: Path, random: Path, labelled: Labelled, *, settings: Probe, views: Views, seed: int
) -> ComparisonRecord:
    """Compare a pretrained net with its two baselines on the same label draws; write probe.json of both.

    Args:
        pretrained: a model directory.
        random: the model directory of the same net at random initialization.
        labelled: images to learn from and held-out images.
        settings: the recipe's [probe] table.
        views: how the few images are varied: as in pretraining, so that no method knows less about the pictures.
        seed: of the from-scratch initializations.
    """
    per_class, draws = settings.labels_per_class, settings.draws
    rows: list[ComparedRow] = []
    for name, path in (("pretrained", pretrained), ("random init", random)):
        found = write_probe(path, labelled, labels_per_class=per_class, draws=draws)
        rows.append(
            ComparedRow(
                name=name,
                few_label_top1=found.few_label_top1,
                knn_top1=found.knn_top1,
                linear_top1=found.linear_top1,
            )
        )
    few = [draw_few(labelled.train.labels, per_class=per_class, draw=draw) for draw in range(draws)]
    starts = {"fine-tuned": pretrained, "from scratch": None}
    record = ModelDir(pretrained).read()
    jobs = [
        FewLabels(
            start=start,
            record=record,
            classes=labelled.classes,
            images=labelled.train.images[chosen].numpy(),
            labels=labelled.train.labels[chosen].numpy(),
            steps=settings.scratch_steps,
            settings=FinetuneConfig(lr=settings.scratch_lr, seed=(seed + draw) % 2**63, device="cpu"),
            views=views,
        )
        for start in starts.values()
        for draw, chosen in enumerate(few)
    ]
    accuracies = train_on_few(jobs, labelled.test)
    for name in starts:
        top1 = summary(list(islice(accuracies, draws)), labels_per_class=per_class)
        rows.append(ComparedRow(name=name, few_label_top1=top1, knn_top1=None, linear_top1=None))
    draws_of = {row.name: row.few_label_top1.draws for row in rows}
    return ComparisonRecord(
        made_from=ModelDir(pretrained).sha256,
        labels_per_class=per_class,
        draws=draws,
        n_test=len(labelled.test),
        data=labelled.train_from,
        test=labelled.test_from,
        scratch=Scratch(steps=settings.scratch_steps, lr=settings.scratch_lr, seed=seed),
        rows=rows,
        differences=[
            difference(a, b, draws_of[a], draws_of[b])
            for a, b in (
                ("pretrained", "random init"),
                ("pretrained", "from scratch"),
                ("fine-tuned", "from scratch"),
            )
        ],
    )


def difference(a: str, b: str, of_a: Sequence[float], of_b: Sequence[float]) -> Difference:
    """Compare the accuracies of two methods draw by draw."""
    paired = [x - y for x, y in zip(of_a, of_b, strict=True)]
    low, high = mean_interval(paired)
    return Difference(a=a, b=b, mean=mean(paired), ci95=[low, high], resolved=low > 0 or high < 0)
