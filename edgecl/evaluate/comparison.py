"""Is pretraining worth it? The pretrained net, what it began as, the same net untrained, and each trained on few labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from edgecl.config.recipe import Probe
from edgecl.config.views import Views
from edgecl.evaluate.few_labels import FewLabels, train_on_few
from edgecl.evaluate.labelled import Labelled, draw_few
from edgecl.evaluate.probe import summary, write_probe
from edgecl.evaluate.supervised import FinetuneConfig
from edgecl.metrics.intervals import mean_interval
from edgecl.nets.backbone import create_backbone
from edgecl.nets.given import load_given
from edgecl.nets.model_dir import write_model
from edgecl.storage.directories import ModelDir
from edgecl.storage.records import ComparedRow, ComparisonRecord, Difference, ModelRecord, Scratch
from edgecl.train.carve import recalibrate_on


@dataclass(frozen=True)
class Compared:
    """The model directories that are compared, all of one net.

    Attributes:
        pretrained: what the run made.
        random: at random initialization.
        given: the weights that the run started from, where it did.
        from_scratch: pretrained from random weights, where the run was not, and there is one.
    """

    pretrained: Path
    random: Path
    given: Path | None = None
    from_scratch: Path | None = None

    @property
    def name(self) -> str:
        """What the run's net is called."""
        return "pretrained further" if self.given else "pretrained"

    @property
    def features(self) -> dict[str, Path]:
        """The nets whose features are evaluated, by name."""
        found = {
            self.name: self.pretrained,
            "given": self.given,
            "pretrained from scratch": self.from_scratch,
            "random init": self.random,
        }
        return {name: path for name, path in found.items() if path is not None}

    @property
    def starts(self) -> dict[str, Path | None]:
        """What is trained on the few labels, by name; None begins at random."""
        if not self.given:
            return {"fine-tuned": self.pretrained, "from scratch": None}
        trained = [name for name in self.features if name != "random init"]
        return {**{f"{name}, fine-tuned": self.features[name] for name in trained}, "from scratch": None}

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Whose differences are taken, by name; the first says whether pretraining paid."""
        if not self.given:
            ours, tuned = self.name, "fine-tuned"
            return [(ours, "random init"), (ours, "from scratch"), (tuned, "from scratch")]
        tuned, *others = self.starts
        return [
            *((tuned, other) for other in others),
            ("given, fine-tuned", "from scratch"),
            (self.name, "given"),
        ]


def write_random(
    out: Path, record: ModelRecord, labelled: Labelled, *, seed: int, force: bool = False
) -> None:
    """Write the same net at random initialization as a model directory, its norms recalibrated like the carved net's."""
    torch.manual_seed(seed)
    net = create_backbone(record.arch, width=record.width, stem_stride=record.stem_stride)
    recalibrate_on(net, labelled.train.images, record.preprocessing)
    _write_baseline(out, net, record, origin="random", force=force)


def write_given(out: Path, weights: str, record: ModelRecord, *, origin: str, force: bool = False) -> str:
    """Write weights that somebody has as a model directory, norms and all as they are.

    Args:
        weights: as [host] init names them.

    Returns:
        the sha256 of the weights.

    Raises:
        EdgeclError: they are gone or of another net, as of `edgecl.nets.given.load_given`.
    """
    given = load_given(weights, arch=record.arch, width=record.width, stem_stride=record.stem_stride)
    _write_baseline(out, given.net, record, origin=origin, force=force)
    return given.sha256


def _write_baseline(out: Path, net: nn.Module, record: ModelRecord, *, origin: str, force: bool) -> None:
    write_model(
        out,
        net,
        arch=record.arch,
        width=record.width,
        stem_stride=record.stem_stride,
        classes=None,
        preprocessing=record.preprocessing,
        origin=origin,
        made_from=None,
        data=record.data,
        recalibrated=origin == "random",
        recipe_name=record.recipe_name,
        force=force,
    )


def compare(
    nets: Compared, labelled: Labelled, *, settings: Probe, views: Views, seed: int, wall_s: float = 0.0
) -> ComparisonRecord:
    """Compare a pretrained net with its baselines on the same label draws; write probe.json of those with features.

    Args:
        views: how the few images are varied: as in pretraining, so that no method knows less about the pictures.
    """
    per_class, draws = settings.labels_per_class, settings.draws
    rows: list[ComparedRow] = []
    for name, path in nets.features.items():
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
    record = ModelDir(nets.pretrained).read()
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
        for start in nets.starts.values()
        for draw, chosen in enumerate(few)
    ]
    accuracies = train_on_few(jobs, labelled.test)
    for name in nets.starts:
        top1 = summary(list(islice(accuracies, draws)), labels_per_class=per_class)
        rows.append(ComparedRow(name=name, few_label_top1=top1, knn_top1=None, linear_top1=None))
    draws_of = {row.name: row.few_label_top1.draws for row in rows}
    differences = [difference(a, b, draws_of[a], draws_of[b]) for a, b in nets.pairs]
    return ComparisonRecord(
        made_from=ModelDir(nets.pretrained).sha256,
        labels_per_class=per_class,
        draws=draws,
        n_test=len(labelled.test),
        data=labelled.train_from,
        test=labelled.test_from,
        scratch=Scratch(steps=settings.scratch_steps, lr=settings.scratch_lr, seed=seed),
        rows=rows,
        differences=differences,
        verdict=did_it_pay(differences[0], wall_s=wall_s) if nets.given else None,
    )


def difference(a: str, b: str, of_a: Sequence[float], of_b: Sequence[float]) -> Difference:
    """Compare the accuracies of two methods draw by draw."""
    paired = [x - y for x, y in zip(of_a, of_b, strict=True)]
    low, high = mean_interval(paired)
    return Difference(a=a, b=b, mean=mean(paired), ci95=[low, high], resolved=low > 0 or high < 0)


def did_it_pay(found: Difference, *, wall_s: float) -> str:
    """Return in words whether a net that was pretrained further and fine-tuned beats one that was fine-tuned at once."""
    assert found.ci95 is not None
    low, high = found.ci95
    size = f"{found.mean:.1f} points [{low:.1f}, {high:.1f}] for {_duration(wall_s)}"
    if low > 0:
        return f"further pretraining gained {size}"
    paid = "pretraining did not pay" if high < 0 else "whether pretraining pays is not resolved"
    return f"fine-tune your weights: {paid} ({size})"


def _duration(seconds: float) -> str:
    return next(
        f"{seconds / size:.1f} {unit}"
        for unit, size in (("hours", 3600), ("minutes", 60), ("seconds", 1))
        if seconds >= size or size == 1
    )
