"""The report's tables as cells of text, for the page, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from edgecl.reports.notation import (
    MISSING,
    between,
    fixed,
    megabytes,
    milliseconds,
    per_second,
    percent,
    scaled,
    scientific,
)
from edgecl.reports.precisions import BundleSummary, ExportedAccuracy, Timing, joined
from edgecl.reports.rows import Accuracy, Comparison, Row, nets_of, row_label
from edgecl.storage.records import ParityCheck

_METRICS = {
    "top1": "top-1",
    "f1": "F1",
    "knn_top1": "kNN top-1",
    "mean_cosine": "cosine",
    # Measured on the net in torch, not on the exported file.
    "linear_top1": "linear, torch",
    "few_label_top1": "few-label, torch",
    "net_top1": "top-1, torch",
    "net_knn_top1": "kNN, torch",
}


@dataclass(frozen=True)
class Column:
    """The head of a column."""

    heading: str
    unit: str = ""
    """Shown where the group is not."""
    group: str = ""
    """What this column and its neighbors have in common."""

    @property
    def in_full(self) -> str:
        """Heading and unit."""
        return joined(self.heading, self.unit, by=" ")

    @property
    def label(self) -> str:
        """Heading and unit, for a place of their own."""
        return joined(self.heading, self.unit)


@dataclass(frozen=True)
class Cell:
    """A value and what stands beside it in small: an interval, a metric, flags."""

    value: str
    beside: str = ""

    @property
    def text(self) -> str:
        """Both in one line."""
        return joined(self.value, self.beside, by=" ")

    @property
    def is_missing(self) -> bool:
        """Whether there is no value."""
        return self.value == MISSING


@dataclass(frozen=True)
class TableRow:
    """A row: its name, its cells, and what it is about."""

    label: str
    cells: list[Cell]
    about: str = ""
    rejected: bool = False


@dataclass
class Table:
    """A table; its first column has the rows' names."""

    title: str
    columns: list[Column]
    kind: str = "rows detail"
    """The page's classes for it."""
    rows: list[TableRow] = field(default_factory=list)

    def add(self, label: str, *cells: Cell | str, about: str = "", rejected: bool = False) -> None:
        """Add a row."""
        found = [Cell(cell) if isinstance(cell, str) else cell for cell in cells]
        self.rows.append(TableRow(label, found, about, rejected))

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Group and number of its columns, for the row over the headings; empty where no column has a group."""
        groups = [(name, len(list(some))) for name, some in groupby(one.group for one in self.columns[1:])]
        return groups if any(name for name, _ in groups) else []

    @property
    def headings(self) -> list[str]:
        """The headings with their units."""
        return [column.in_full for column in self.columns]

    @property
    def lines(self) -> list[list[str]]:
        """The rows as lists of text."""
        return [[row.label, *(cell.text for cell in row.cells)] for row in self.rows]


def _table(title: str, *headings: str, kind: str = "rows detail") -> Table:
    return Table(title, [Column(heading) for heading in headings], kind)


def report_tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of nets and of bundles by device and precision; those that have rows."""
    nets, exported = nets_of(rows), [row for row in rows if row.bundle]
    counts = {row.few_label.labels_per_class for row in rows if row.few_label}
    few_label = f"few-label ({counts.pop()}/class)" if len(counts) == 1 else "few-label"
    accuracies = {"few_label": few_label, "knn": "kNN", "linear": "linear", "finetuned": "fine-tuned"}
    of_accuracy = [Column(heading, "%", "Accuracy, top-1 %") for heading in accuracies.values()]
    of_cost = [Column(heading, group="Cost") for heading in ("MACs", "params")]
    of_nets = Table("Nets", [Column("net"), *of_accuracy, *of_cost], "rows nets")
    for row in nets:
        cells = [_accuracy(row.of_net(key)) for key in accuracies]
        of_nets.add(row_label(row, nets), *cells, scaled(row.macs), scaled(row.params), about=row.about_net)
    columns = [
        (column, write)
        for column, write, optional in _BUNDLE_COLUMNS
        # The others show also that nothing was measured.
        if not optional or not all(write(row).is_missing for row in exported)
    ]
    title, headings = "Bundles, by device and precision", [Column("net"), *(column for column, _ in columns)]
    of_bundles = Table(title, headings, "rows bundles")
    for row in exported:
        cells = [write(row) for _, write in columns]
        of_bundles.add(row_label(row, rows), *cells, about=row.about_bundle, rejected=row.is_rejected)
    return [table for table in (of_nets, of_bundles) if table.rows]


def _accuracy(accuracy: Accuracy | None) -> Cell:
    return Cell(percent(accuracy.top1), between(accuracy.ci95)) if accuracy else Cell(MISSING)


def _exported_accuracy(accuracy: ExportedAccuracy | None) -> Cell:
    if accuracy is None:
        return Cell(MISSING)
    metric = _METRICS.get(accuracy.metric, accuracy.metric)
    if accuracy.metric == "mean_cosine":
        interval = between(accuracy.ci95, lambda end: fixed(end, 4))
        return Cell(fixed(accuracy.value, 4), joined(interval, metric, by=" "))
    return Cell(f"{percent(accuracy.value)} %", joined(between(accuracy.ci95), metric, by=" "))


def _p50(row: Row) -> Cell:
    return Cell(milliseconds(row.p50), joined(row.p50_interval, *row.flags))


def _percentile(key: str) -> Callable[[Row], Cell]:
    return lambda row: Cell(milliseconds(getattr(row.latency_ms, key, None)))


# A column, what it shows of a row, and whether it is left out where no row has a value.
_BUNDLE_COLUMNS: tuple[tuple[Column, Callable[[Row], Cell], bool], ...] = (
    (Column("accuracy", group="Exported"), lambda row: _exported_accuracy(row.accuracy), False),
    (Column("p50", "ms", "Latency, ms"), _p50, False),
    (Column("p90", "ms", "Latency, ms"), _percentile("p90"), False),
    (Column("p99", "ms", "Latency, ms"), _percentile("p99"), False),
    (Column("images/s", group="Speed"), lambda row: Cell(per_second(row.throughput_per_s)), False),
    (Column("J/inference", group="Energy"), lambda row: Cell(milliseconds(row.j_per_inference)), True),
    (Column("ONNX MB", group="Size"), lambda row: Cell(megabytes(row.onnx_bytes)), False),
    (
        Column("decision", group="Precision"),
        lambda row: Cell(row.decision.in_short if row.decision else MISSING),
        True,
    ),
)


def precision_table(bundle: BundleSummary) -> Table | None:
    """Return the table of a bundle's precisions, or None where there is nothing to compare."""
    if len(bundle.precisions) < 2 and not any(one.decision for one in bundle.precisions):
        return None
    headings = ["precision", "form", "opset", "ONNX MB", "relative difference", "same top-1 %", "verify"]
    table = _table("Precisions", *headings, "decision")
    for one in bundle.precisions:
        table.add(
            one.precision + (" (default)" if one.default else " (left out)" if one.is_left_out else ""),
            one.form or MISSING,
            str(one.opset or MISSING),
            megabytes(one.file_bytes),
            scientific(one.max_relative_difference),
            _share(one.top1_agreement),
            {True: "passed", False: "failed", None: MISSING}[one.verified],
            one.decision.in_short if one.decision else "not evaluated",
        )
    return table


def _share(share: float | None) -> str:
    return percent(None if share is None else 100 * share)


def parity_table(steps: Sequence[ParityCheck]) -> Table:
    """Return a parity report, one row per step."""
    headings = ["step", "max difference", "mean difference", "relative", "same top-1 %", "cosine", "images"]
    table = _table("Parity report", *headings, "first layer out of tolerance")
    for step in steps:
        table.add(
            f"{step.source} → {step.variant}",
            scientific(step.max_abs_difference),
            scientific(step.mean_abs_difference),
            scientific(step.max_relative_difference),
            _share(step.top1_agreement),
            MISSING if step.mean_cosine is None else fixed(step.mean_cosine, 5),
            MISSING if step.images is None else fixed(step.images, 0),
            step.first_diverging_layer or "none",
        )
    return table


def mode_tables(bundle: BundleSummary) -> list[tuple[Table, list[str]]]:
    """Return a table for each way of timing in which a precision has several modes, and sentences on its energy."""
    ways: dict[str, list[Timing]] = {}
    for timing in bundle.timings:
        words = joined(timing.runtime, timing.device, timing.power_mode, *timing.batch_and_threads)
        ways.setdefault(words, []).append(timing)
    return [
        (_mode_table(words, timings), _energy_in_words(timings))
        for words, timings in ways.items()
        if not all(timing.headline for timing in timings)
    ]


def _mode_table(title: str, timings: Sequence[Timing]) -> Table:
    energy = ["J/inference"] if any(timing.energy for timing in timings) else []
    headings = ["precision, mode", "p50 ms", "p90 ms", "p99 ms", "mean ms", "images/s", "samples", *energy]
    table = _table(title, *headings)
    for timing in timings:
        latency = timing.latency_ms
        flags = f"({', '.join(timing.flags)})" if timing.flags else ""
        cells = [
            joined(milliseconds(latency.p50), between(latency.ci95_p50, milliseconds), flags, by=" "),
            *map(milliseconds, (latency.p90, latency.p99, latency.mean)),
            per_second(timing.throughput_per_s),
            MISSING if timing.samples is None else fixed(timing.samples, 0),
        ]
        if energy:
            cells.append(milliseconds(timing.energy.j_per_inference if timing.energy else None))
        table.add(timing.what, *cells)
    return table


def _energy_in_words(timings: Sequence[Timing]) -> list[str]:
    sentences = []
    for timing in timings:
        if energy := timing.energy:
            watts = joined(
                f"{milliseconds(energy.idle_w)} W idle" if energy.idle_w is not None else "",
                f"{milliseconds(energy.load_w)} W under load" if energy.load_w is not None else "",
            )
            how = joined(
                watts,
                f"rails {', '.join(energy.rails)}" if energy.rails else "",
                f"read from {energy.source}" if energy.source else "",
                f"{fixed(energy.rate_hz, 0)} times a second" if energy.rate_hz is not None else "",
                by="; ",
            )
            sentences.append(f"Energy of {timing.what}: {how}.")
    return list(dict.fromkeys(sentences))


def comparison_table(comparison: Comparison) -> Table:
    """Return a pipeline's nets side by side."""
    few_label = f"few-label ({comparison.labels_per_class}/class) %"
    table = _table("Side by side", "net", few_label, "kNN %", "linear %", kind="compare")
    for net in comparison.nets:
        table.add(net.name, _accuracy(net.few_label), percent(net.knn_top1), percent(net.linear_top1))
    return table
