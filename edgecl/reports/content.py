"""What a report says: every number and sentence of the page, as report.json holds it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from edgecl.errors import counted, printable
from edgecl.reports.collect import Collection, Line, Source, content_of
from edgecl.reports.families import Family, families_of, family_in_words, lines_in
from edgecl.reports.notation import duration, fixed
from edgecl.reports.pareto import TradeOff, size_trade_off, trade_off
from edgecl.reports.precisions import BundleSummary, Part, bundle_summary, joined
from edgecl.reports.rows import ORIGINS, Comparison, Row, comparison_of, rows_of
from edgecl.reports.sentences import decision_of, plateaus_in_words, warnings_of
from edgecl.storage.directories import ReportDir
from edgecl.storage.records import (
    ComparisonRecord,
    Confusion,
    FeatureMap,
    InspectionRecord,
    Json,
    Manifest,
    ModelRecord,
    PipelineRecord,
    Record,
    RunRecord,
    Text,
    command_line,
)

MOST_POINTS = 240
"""How many points a curve has at most."""


class Curve(Part):
    """A quantity over epochs, thinned to what a chart can show: mean and extremes of neighboring steps."""

    epoch: list[float] = Field(default_factory=list)
    mean: list[float] = Field(default_factory=list)
    low: list[float] = Field(default_factory=list)
    high: list[float] = Field(default_factory=list)


class Panel(Part):
    """A chart of a run: what its method asks for, or what every run logs."""

    title: str
    lines: dict[str, str]
    """What is logged -> the name of its line."""
    unit: str = ""
    log: bool = False
    """Whether its axis is logarithmic where every value is positive and they span a decade."""
    low: float | None = None
    """The lower end of the value axis; None follows the data."""
    high: float | None = None
    reference: float | None = None
    """A value to mark with a dashed line."""


def _of_both(kind: str) -> dict[str, str]:
    return {f"{kind}_host": "host", f"{kind}_slim": "slim"}


_UP_TO_ONE: dict[str, Any] = {"low": 0.0, "high": 1.0, "reference": 1.0}
_OF_EVERY_RUN = (
    Panel(title="Diagonal of C", lines={"diagonal": "diagonal"}, unit="mean, goal 1", **_UP_TO_ONE),
    Panel(title="Off-diagonal of C", lines={"off_diagonal_rms": "off-diagonal"}, unit="RMS, goal 0", low=0.0),
    Panel(title="RankMe", lines=_of_both("rankme"), unit="dimensions in use", low=0.0),
    Panel(title="kNN top-1", lines=_of_both("knn_top1"), unit="%"),
    Panel(title="Embedding std", lines={"std": "std"}, unit="0 is collapsed", **_UP_TO_ONE),
    Panel(title="Gradient norm", lines=_of_both("grad_norm"), log=True),
    Panel(title="Learning rate", lines={"lr": "lr"}, low=0.0),
    Panel(title="Throughput", lines={"images_per_s": "images/s"}, unit="images/s", low=0.0),
)


class RunSummary(Part):
    """What the page shows of one run."""

    name: str
    method: str | None
    recipe_name: str | None
    state: str
    wall_s: float
    steps: float | None
    total_steps: float | None
    from_epoch: float
    epochs: float
    steps_per_point: int
    panels: list[Panel]
    curves: dict[str, Curve]

    @property
    def in_words(self) -> str:
        """How far it is, and how its curves are thinned."""
        total = f" of {fixed(self.total_steps, 0)}" if self.total_steps is not None else ""
        text = joined(
            self.name + (f" ({self.method})" if self.method else ""),
            f"{fixed(self.steps, 0)}{total} steps" if self.steps is not None else "",
            duration(self.wall_s),
            {"done": "", "failed": "failed"}.get(self.state, "not finished"),
        )
        if self.steps_per_point > 1:
            text += f". Lines are means of {self.steps_per_point} logged steps, bands their extremes"
        return f"{text}."


class ConfidentMistake(Part):
    """A held-out image that was taken for another class."""

    label: str
    predicted: str
    confidence: float


class Inspection(Part):
    """Which held-out images a net confuses, and how its features lie."""

    name: str
    in_words: str
    classes: list[str]
    confusion: list[Confusion]
    mistakes: list[ConfidentMistake]
    """The most confident ones; their pictures are on the page."""
    map: FeatureMap


_HEADER = ("command", "made_by", "made_from", "schema", "kind")


class Origin(Part):
    """One record the report was made from, and how it came to be."""

    title: str
    about: str
    file: str
    made_from_name: str | None
    record: Json

    @property
    def rest(self) -> Json:
        """The record without what says how it came to be."""
        return {key: value for key, value in self.record.items() if key not in _HEADER}


class Report(Record):
    """report.json: the numbers that a report's page shows, and the records behind them."""

    KIND = ReportDir.KIND
    FILE = ReportDir.RECORD

    kind: Literal["report"] = "report"
    title: Text
    decision: Text
    support: list[Text]
    rows: list[Row]
    """One for each net, bundle, precision and measurement."""
    bundles: list[BundleSummary]
    comparison: Comparison | None
    further_comparisons: list[Comparison]
    trade_off: TradeOff | None
    """Accuracy against latency."""
    size_trade_off: TradeOff | None
    """Accuracy against MACs or parameters, where no latency joins the nets of one run."""
    families: list[Family]
    """Nets of several widths out of one checkpoint."""
    inspections: list[Inspection]
    """Of every net but those at random initialization."""
    runs: list[RunSummary]
    notes: list[Text]
    conditions: list[Origin]
    """Every record the report was made from."""

    @property
    def comparisons(self) -> list[Comparison]:
        """All comparisons."""
        return [self.comparison, *self.further_comparisons] if self.comparison else []


def report_of(collection: Collection) -> Report:
    """Return the report on what was read."""
    rows = rows_of(collection)
    families = families_of(collection, rows)
    trade = trade_off(rows)
    for group in trade.groups if trade else []:
        group.families = lines_in(group, families, rows)
    comparisons = [comparison_of(one, collection) for one in collection.of(ComparisonRecord)]
    bundles = [bundle_summary(one) for one in collection.of(Manifest)]
    decision, support = decision_of(comparisons, rows, bundles, collection)
    stuck, what_to_change = plateaus_in_words(collection.of(RunRecord))
    has_line = trade is not None and bool(trade.lines)
    return Report(
        made_from=collection.sha256(),
        command=printable(command_line()),
        title=_title(collection),
        decision=" ".join([*stuck, decision]),
        support=[*what_to_change, *support, *(family_in_words(family, rows) for family in families)],
        rows=rows,
        bundles=bundles,
        comparison=comparisons[0] if comparisons else None,
        further_comparisons=comparisons[1:],
        trade_off=trade,
        size_trade_off=None if has_line else size_trade_off(rows, [family.rows for family in families]),
        families=families,
        inspections=[_inspection(one.name, record) for one, record in inspected(collection)],
        runs=[run_summary(run) for run in collection.of(RunRecord)],
        notes=[*collection.notes, *warnings_of(rows, collection)],
        conditions=list(_origins(collection)),
    )


def _title(collection: Collection) -> str:
    pipelines, runs = collection.of(PipelineRecord), collection.of(RunRecord)
    recipes = [one.record.recipe_name for one in pipelines] or [one.record.recipe_name for one in runs]
    names = list(dict.fromkeys(recipes)) if any(recipes[:1]) else [one.name for one in collection.sources]
    return f"edgecl report: {names[0]}" + (" and others" if len(names) > 1 else "")


def inspected(collection: Collection) -> list[tuple[Source[ModelRecord], InspectionRecord]]:
    """Return the nets whose inspection is shown, with it."""
    return [
        (one, one.inspection)
        for one in collection.of(ModelRecord)
        if one.inspection and one.record.origin != "random"
    ]


def _inspection(name: str, record: InspectionRecord) -> Inspection:
    classes = record.classes
    wrong = [pair for pair in record.confusion if pair.label != pair.predicted]
    text = f"The {record.predicted_by} takes {sum(pair.images for pair in wrong):,} of "
    text += f"{counted(record.n_test, 'held-out image')} for another class"
    if wrong:
        most = max(wrong, key=lambda pair: pair.images)
        text += f", most often {classes[most.label]} for {classes[most.predicted]} ({most.images:,})"
    mistakes = [
        ConfidentMistake(
            label=classes[one.label], predicted=classes[one.predicted], confidence=one.confidence
        )
        for one in record.mistakes
    ]
    return Inspection(
        name=name,
        in_words=f"{text}.",
        classes=classes,
        confusion=record.confusion,
        mistakes=mistakes,
        map=record.map,
    )


def run_summary(run: Source[RunRecord]) -> RunSummary:
    """Return what a page shows of a run, whether it is done or not."""
    record = run.record
    total, per_epoch = record.total_steps, record.steps_per_epoch
    lines = [*run.steps, *run.quality]
    at = [line["epoch"] for line in lines]
    first, last = min(at, default=0.0), max(at, default=1.0)
    # The axis ends where the plan ends, so that an unfinished run looks unfinished; it begins at zero unless
    # the run went on from a checkpoint so late that its own part would be a sliver.
    epochs = max(total / per_epoch if total and per_epoch else 0.0, last) or 1.0
    panels = [*_own_panels(record), *(_with_narrower(panel, run.quality) for panel in _OF_EVERY_RUN)]
    keys = dict.fromkeys(key for panel in panels for key in panel.lines)
    return RunSummary(
        name=run.name,
        method=record.method,
        recipe_name=record.recipe_name,
        state=record.state,
        wall_s=record.wall_s,
        steps=run.steps[-1]["step"] if run.steps else None,
        total_steps=total,
        from_epoch=float(math.floor(first)) if 0.25 * epochs < first < epochs else 0.0,
        epochs=epochs,
        steps_per_point=max(1, -(-len(run.steps) // MOST_POINTS)),
        panels=panels,
        curves={key: found for key in keys if (found := curve(lines, key))},
    )


def _own_panels(record: RunRecord) -> Iterator[Panel]:
    """Yield the panels that a run's method asks for, each name cut to the room that a chart has."""
    for panel in record.panels:
        if isinstance(panel.get("lines"), dict):
            yield Panel(
                title=str(panel.get("title"))[:60],
                unit=str(panel.get("unit") or "")[:20],
                log=panel.get("log") is True,
                lines={key: str(name)[:24] for key, name in panel["lines"].items()},
            )
    if not record.panels:
        yield Panel(title="Loss", log=True, lines={"loss": "total"})


def _with_narrower(panel: Panel, quality: Sequence[Line]) -> Panel:
    """Add lines of the slim nets narrower than the widest, which is "slim"."""
    kind = next(iter(panel.lines)).removesuffix("host")
    prefix = f"{kind}slim_at_"
    found = {printable(key) for line in quality for key in line if key.startswith(prefix)}
    narrower = {key: f"{key.removeprefix(prefix)}×" for key in sorted(found, reverse=True)}
    return panel.model_copy(update={"lines": panel.lines | narrower})


def curve(lines: Sequence[Line], key: str) -> Curve | None:
    """Return one quantity over epochs in at most MOST_POINTS points, or None when no line has it.

    Neighboring steps are put together with their mean and their extremes, so that a spike stays visible.
    """
    known = [(line["epoch"], line[key]) for line in lines if key in line]
    if not known:
        return None
    share = -(-len(known) // MOST_POINTS)
    found = Curve()
    for start in range(0, len(known), share):
        epochs, values = zip(*known[start : start + share], strict=True)
        # Six digits are more than any chart shows, and keep report.json small.
        found.epoch.append(_six_digits(sum(epochs) / len(epochs)))
        found.mean.append(_six_digits(sum(values) / len(values)))
        found.low.append(_six_digits(min(values)))
        found.high.append(_six_digits(max(values)))
    return found


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def _origins(collection: Collection) -> Iterator[Origin]:
    for source in collection.sources:
        maker = collection.maker_of(source)
        files = [(source.record.FILE, source.record, maker.name if maker else None)]
        files += [(name, record, source.name) for name, record in sorted(source.beside.items())]
        for name, record, made_from_name in files:
            yield Origin(
                title=f"{source.name}/{name}" if source.name else name,
                about=_ABOUT[record.kind] if record.kind in _ABOUT else _about(source),
                file=f"{source.shown}/{name}",
                made_from_name=made_from_name if record.made_from else None,
                record=content_of(record),
            )


_ABOUT = {
    "probe": "kNN, linear and few-label accuracy",
    "cost": "MACs and parameters",
    "evaluation": "fine-tuned accuracy",
    "verify": "bundle against its reference outputs",
    "bench": "latency",
    "comparison": "pretrained, random and from scratch, side by side",
    "pipeline": "the whole pipeline",
    "run": "pretraining",
    "bundle": "exported bundle",
}


def _about(source: Source[Record]) -> str:
    origin = source.record.origin if isinstance(source.record, ModelRecord) else None
    return f"{ORIGINS.get(origin, origin)} net" if origin else "net"
