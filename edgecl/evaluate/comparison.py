"""Is pretraining worth it? The pretrained net, the same net untrained, and the same net trained on the few labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from edgecl.config.views import Views
from edgecl.evaluate.few_labels import FewLabels, train_on_few
from edgecl.evaluate.labelled import Labelled, draw_few
from edgecl.evaluate.probe import load_feature_net, probe_net, summary
from edgecl.evaluate.supervised import FinetuneConfig
from edgecl.metrics.intervals import mean_interval
from edgecl.nets.backbone import create_backbone
from edgecl.nets.model_dir import write_model
from edgecl.storage.directories import ModelDir
from edgecl.storage.records import (
    ComparedRow,
    ComparisonRecord,
    Difference,
    ModelRecord,
    ProbeRecord,
    Scratch,
)
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
    pretrained: Path,
    random: Path,
    labelled: Labelled,
    *,
    labels_per_class: int,
    draws: int,
    scratch_steps: int,
    scratch_lr: float,
    views: Views,
    seed: int,
) -> tuple[ComparisonRecord, dict[str, ProbeRecord]]:
    """Compare a pretrained net with its two baselines on the same label draws.

    Args:
        pretrained: a model directory.
        random: the model directory of the same net at random initialization.
        labelled: images to learn from and held-out images.
        labels_per_class: labels in each draw.
        draws: label draws, at least 2; every method sees the same ones.
        scratch_steps: steps of the net trained from scratch on a draw's labels.
        scratch_lr: its rate.
        views: how the few images are varied: as in pretraining, so that no method knows less about the pictures.
        seed: of the from-scratch initializations.

    Returns:
        the comparison, and the probe of each model directory by name.
    """
    rows: list[ComparedRow] = []
    probes: dict[str, ProbeRecord] = {}
    for name, path in (("pretrained", pretrained), ("random init", random)):
        net, record = load_feature_net(path)
        found = probe_net(
            net,
            labelled,
            preprocessing=record.preprocessing,
            labels_per_class=labels_per_class,
            draws=draws,
            made_from=ModelDir(path).sha256,
        )
        probes[name] = found
        rows.append(
            ComparedRow(
                name=name,
                few_label_top1=found.few_label_top1,
                knn_top1=found.knn_top1,
                linear_top1=found.linear_top1,
            )
        )
    rows += _trained_rows(
        pretrained,
        labelled,
        few=[draw_few(labelled.train.labels, per_class=labels_per_class, draw=draw) for draw in range(draws)],
        labels_per_class=labels_per_class,
        steps=scratch_steps,
        lr=scratch_lr,
        views=views,
        seed=seed,
    )
    draws_of = {row.name: row.few_label_top1.draws for row in rows}
    comparison = ComparisonRecord(
        made_from=ModelDir(pretrained).sha256,
        labels_per_class=labels_per_class,
        draws=draws,
        n_test=len(labelled.test),
        data=labelled.train_from,
        test=labelled.test_from,
        scratch=Scratch(steps=scratch_steps, lr=scratch_lr, seed=seed),
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
    return comparison, probes


def _trained_rows(
    pretrained: Path,
    labelled: Labelled,
    *,
    few: Sequence[Tensor],
    labels_per_class: int,
    steps: int,
    lr: float,
    views: Views,
    seed: int,
) -> list[ComparedRow]:
    """Train on each draw of few labels, from the pretrained weights and from random ones, and return their rows."""
    starts = {"fine-tuned": pretrained, "from scratch": None}
    record = ModelDir(pretrained).read()
    jobs = [
        FewLabels(
            start=start,
            record=record,
            classes=labelled.classes,
            images=labelled.train.images[chosen].numpy(),
            labels=labelled.train.labels[chosen].numpy(),
            steps=steps,
            settings=FinetuneConfig(lr=lr, seed=(seed + draw) % 2**63, device="cpu"),
            views=views,
        )
        for start in starts.values()
        for draw, chosen in enumerate(few)
    ]
    found = train_on_few(jobs, labelled.test)
    return [
        ComparedRow(
            name=name,
            few_label_top1=summary(list(islice(found, len(few))), labels_per_class=labels_per_class),
            knn_top1=None,
            linear_top1=None,
        )
        for name in starts
    ]


def difference(a: str, b: str, of_a: Sequence[float], of_b: Sequence[float]) -> Difference:
    """Compare the accuracies of two methods draw by draw."""
    paired = [x - y for x, y in zip(of_a, of_b, strict=True)]
    low, high = mean_interval(paired)
    return Difference(a=a, b=b, mean=mean(paired), ci95=[low, high], resolved=low > 0 or high < 0)
