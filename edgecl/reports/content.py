"""What a report says: every number and sentence of the page, as report.json holds it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from edgecl.reports.collect import (
    BundleSource,
    Collection,
    ComparisonSource,
    Line,
    PipelineSource,
    Record,
    RunSource,
    Source,
    cleaned,
)
from edgecl.reports.families import Family, families_of, family_in_words, lines_in
from edgecl.reports.pareto import TradeOff, size_trade_off, trade_off
from edgecl.reports.precisions import BundleSummary, Part, bundle_summary, tables
from edgecl.reports.rows import ORIGINS, Comparison, Row, comparison_of, rows_of
from edgecl.reports.sentences import decision_of, plateaus_in_words, warnings_of
from edgecl.storage.artifacts import record_header
from edgecl.storage.reading import reading

MOST_POINTS = 240
"""How many points a curve has at most."""
# Logged by every method; what else a method logs is named by the panels of its run.
_STEP_KEYS = (
    "loss",
    "diagonal",
    "off_diagonal_rms",
    "std",
    "grad_norm_host",
    "grad_norm_slim",
    "lr",
    "images_per_s",
)
_QUALITY_KEYS = ("rankme_host", "rankme_slim", "knn_top1_host", "knn_top1_slim")
# Of the slim nets narrower than the widest, which is "slim".
FURTHER_WIDTHS = ("rankme_slim_at_", "knn_top1_slim_at_")


class Header(Part):
    """The first keys of every record."""

    schema_: int = Field(alias="schema")
    kind: str
    made_by: str
    made_from: str | None
    command: str

    @property
    def content(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return self.model_dump(mode="json", by_alias=True)


class Curve(Part):
    """A quantity over epochs, thinned to what a chart can show: mean and extremes of neighboring steps."""

    epoch: list[float] = Field(default_factory=list)
    mean: list[float] = Field(default_factory=list)
    low: list[float] = Field(default_factory=list)
    high: list[float] = Field(default_factory=list)


class Panel(Part):
    """A chart that a run's method asks for."""

    title: str
    unit: str = ""
    log: bool = False
    lines: dict[str, str]
    """What is logged -> the name of its line."""


class RunSummary(Part):
    """What the page shows of one run."""

    name: str
    method: str | None
    recipe_name: str | None
    state: str | None
    wall_s: float | None
    steps: float | None
    total_steps: float | None
    from_epoch: float
    epochs: float
    steps_per_point: int
    panels: list[Panel]
    curves: dict[str, Curve]


class Origin(Part):
    """One record the report was made from, and how it came to be."""

    title: str
    about: str
    file: str
    made_from_name: str | None
    record: Record


class Report(Header):
    """The content of report.json: every number the page shows, and the records behind them."""

    title: str
    decision: str
    support: list[str]
    rows: list[Row]
    bundles: list[BundleSummary]
    comparison: Comparison | None
    further_comparisons: list[Comparison]
    trade_off: TradeOff | None
    size_trade_off: TradeOff | None
    families: list[Family]
    runs: list[RunSummary]
    notes: list[str]
    conditions: list[Origin]

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
    comparisons, bundles, runs = [], [], []
    for source in collection.sources:
        with reading(source.path / source.file):
            if isinstance(source, ComparisonSource):
                comparisons.append(comparison_of(source, collection))
            elif isinstance(source, BundleSource):
                bundles.append(bundle_summary(source))
            elif isinstance(source, RunSource):
                runs.append(_run_summary(source))
    decision, support = decision_of(comparisons, rows, bundles, collection)
    stuck, what_to_change = plateaus_in_words(collection.of(RunSource))
    has_line = trade is not None and bool(trade.lines)
    return Report(
        **cleaned(record_header("report", made_from=collection.sha256())),
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
        runs=runs,
        notes=[*collection.notes, *warnings_of(rows, collection)],
        conditions=list(_origins(collection)),
    )


def _title(collection: Collection) -> str:
    for kind in (PipelineSource, RunSource):
        names = [source.record.get("recipe_name") for source in collection.of(kind)]
        if names and names[0]:
            return f"edgecl report: {names[0]}" + (" and others" if len(set(names)) > 1 else "")
    names = [source.name for source in collection.sources]
    return f"edgecl report: {names[0]}" + (" and others" if len(names) > 1 else "")


def _run_summary(run: RunSource) -> RunSummary:
    record = run.record
    total, per_epoch = record.get("total_steps"), record.get("steps_per_epoch")
    at = [line["epoch"] for line in (*run.steps, *run.quality)]
    first, last = min(at, default=0.0), max(at, default=1.0)
    # The axis ends where the plan ends, so that an unfinished run looks unfinished; it begins at zero unless
    # the run went on from a checkpoint so late that its own part would be a sliver.
    epochs = max(total / per_epoch if total and per_epoch else 0.0, last) or 1.0
    panels = list(_panels(record))
    own = [key for panel in panels for key in panel.lines]
    further = {key for line in run.quality for key in line if key.startswith(FURTHER_WIDTHS)}
    return RunSummary(
        name=run.name,
        method=record.get("arm"),
        recipe_name=record.get("recipe_name"),
        state=record.get("state"),
        wall_s=record.get("wall_s"),
        steps=run.steps[-1]["step"] if run.steps else None,
        total_steps=total,
        from_epoch=float(math.floor(first)) if 0.25 * epochs < first < epochs else 0.0,
        epochs=epochs,
        steps_per_point=max(1, -(-len(run.steps) // MOST_POINTS)),
        panels=panels,
        curves={
            **_curves(run.steps, [*_STEP_KEYS, *own]),
            **_curves(run.quality, [*_QUALITY_KEYS, *sorted(further, reverse=True)]),
        },
    )


def _panels(record: Record) -> Iterator[Panel]:
    """Yield the panels that a run's method asks for, each name cut to the room that a chart has."""
    found = tables(record, "panels")
    for panel in found:
        if isinstance(panel.get("lines"), dict):
            yield Panel(
                title=str(panel.get("title"))[:60],
                unit=str(panel.get("unit") or "")[:20],
                log=panel.get("log") is True,
                lines={key: str(name)[:24] for key, name in panel["lines"].items()},
            )
    if not found:
        yield Panel(title="Loss", log=True, lines={"loss": "total"})


def curve(lines: Sequence[Line], key: str) -> Curve | None:
    """Return one quantity over epochs, or None when no line has it.

    Returns:
        At most MOST_POINTS points: neighboring steps are put together in equal shares, with their mean and their
        extremes, so that a spike stays visible.
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


def _curves(lines: Sequence[Line], keys: Sequence[str]) -> dict[str, Curve]:
    return {key: found for key in keys if (found := curve(lines, key))}


def _origins(collection: Collection) -> Iterator[Origin]:
    for source in collection.sources:
        maker = collection.maker_of(source)
        files = [(source.file, source.record, maker.name if maker else None)]
        files += [(name, record, source.name) for name, record in sorted(source.beside.items())]
        for name, record, made_from_name in files:
            yield Origin(
                title=f"{source.name}/{name}" if source.name else name,
                about=_ABOUT.get(name.partition("-")[0].removesuffix(".json"), "") or _about(source),
                file=f"{source.shown}/{name}",
                made_from_name=made_from_name if record.get("made_from") else None,
                record=record,
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
    "manifest": "exported bundle",
}


def _about(source: Source) -> str:
    origin = source.record.get("origin")
    return f"{ORIGINS.get(origin, origin)} net" if isinstance(origin, str) else "net"
