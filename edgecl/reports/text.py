"""The report's tables as strings, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgecl.errors import counted, printable
from edgecl.reports.families import family_tables
from edgecl.reports.notation import (
    MINUS,
    MISSING,
    between,
    fixed,
    megabytes,
    milliseconds,
    per_second,
    percent,
    points,
    scaled,
    scientific,
)
from edgecl.reports.precisions import METRICS, decision_in_short
from edgecl.reports.rows import Row, conditions_of_row, net_of_row, nets_of, row_label
from edgecl.reports.rules import METRICS as METRICS_OF_RULES

# Key, heading of a group, heading of the column, and its unit.
Column = tuple[str, str, str, str]
_NET_COLUMNS: tuple[Column, ...] = (
    ("few_label", "Accuracy, top-1 %", "few-label", "%"),
    ("knn", "Accuracy, top-1 %", "kNN", "%"),
    ("linear", "Accuracy, top-1 %", "linear", "%"),
    ("finetuned", "Accuracy, top-1 %", "fine-tuned", "%"),
    ("macs", "Cost", "MACs", ""),
    ("params", "Cost", "params", ""),
)
_BUNDLE_COLUMNS: tuple[Column, ...] = (
    ("accuracy", "Exported", "accuracy", ""),
    ("p50", "Latency, ms", "p50", "ms"),
    ("p90", "Latency, ms", "p90", "ms"),
    ("p99", "Latency, ms", "p99", "ms"),
    ("throughput_per_s", "Speed", "images/s", "/s"),
    ("j_per_inference", "Energy", "J/inference", "J"),
    ("onnx_bytes", "Size", "ONNX MB", "MB"),
    ("decision", "Precision", "decision", ""),
)
# Columns that are left out where no row has a value; of the others it is worth saying that nothing was measured.
_IF_KNOWN = ("j_per_inference", "decision")


@dataclass(frozen=True)
class Table:
    """One table of a report: which rows it has, and what it says of each."""

    name: str
    """`nets` or `bundles`."""
    title: str
    columns: tuple[Column, ...]
    rows: list[Row]

    def headings(self, record: dict[str, Any]) -> list[str]:
        """Return the columns' headings, with their unit where the group has it."""
        return [heading_with_unit(column, record) for column in self.columns]


def tables_of(record: dict[str, Any]) -> list[Table]:
    """Return the tables of a report: its nets, and its bundles by device and precision; those that have rows.

    Args:
        record: what `report` returns, or report.json read back.
    """
    rows = record["rows"]
    nets = nets_of(rows)
    exported = [row for row in rows if row["bundle"]]
    columns = tuple(
        column
        for column in _BUNDLE_COLUMNS
        if column[0] not in _IF_KNOWN or any(row[column[0]] is not None for row in exported)
    )
    tables = [
        Table("nets", "Nets", _NET_COLUMNS, nets),
        Table("bundles", "Bundles, by device and precision", columns, exported),
    ]
    return [table for table in tables if table.rows]


def label_in(table: Table, row: Row, record: dict[str, Any]) -> str:
    """Call a row by as much as tells it from the other rows of its table."""
    among = table.rows if table.name == "nets" else record["rows"]
    return row_label(row, among)


def cell(row: Row, key: str) -> tuple[str, str]:
    """Write one value of a row as (value, what stands beside it in small): an interval, a metric, marks."""
    if key in ("few_label", "knn", "linear", "finetuned"):
        one = row[key]
        return (percent(one["top1"]), between(one["ci95"])) if one else (MISSING, "")
    if key == "accuracy":
        return _accuracy(row["accuracy"])
    if key in ("p50", "p90", "p99"):
        latency = row["latency_ms"] or {}
        beside = between(latency.get("ci95_p50"), milliseconds) if key == "p50" else ""
        marks = ", ".join(row["marks"]) if key == "p50" else ""
        return milliseconds(latency.get(key)), ", ".join(part for part in (beside, marks) if part)
    if key == "decision":
        return decision_in_short(row["decision"]) or MISSING, ""
    write = {
        "throughput_per_s": per_second,
        "j_per_inference": milliseconds,
        "macs": scaled,
        "params": scaled,
        "onnx_bytes": megabytes,
    }[key]
    return write(row[key]), ""


def _accuracy(accuracy: dict[str, Any] | None) -> tuple[str, str]:
    if accuracy is None:
        return MISSING, ""
    if accuracy["metric"] == "mean_cosine":
        value, interval = fixed(accuracy["value"], 4), between(accuracy["ci95"], lambda end: fixed(end, 4))
    else:
        value, interval = f"{percent(accuracy['value'])} %", between(accuracy["ci95"])
    return value, " ".join(part for part in (interval, METRICS[accuracy["metric"]]) if part)


def cells_of_row(row: Row, columns: Sequence[Column]) -> list[tuple[str, str]]:
    """Write a row as (value, beside) strings, one pair for each column."""
    return [cell(row, key) for key, *_ in columns]


def heading_of(column: Column, record: dict[str, Any]) -> str:
    """Name a column; the few-label one with the labels per class where all rows agree on them."""
    key, _, heading, _ = column
    if key != "few_label":
        return heading
    counts = {str(row["few_label"]["labels_per_class"]) for row in record["rows"] if row["few_label"]}
    return f"few-label ({counts.pop()}/class)" if len(counts) == 1 else "few-label"


def heading_with_unit(column: Column, record: dict[str, Any]) -> str:
    """Name a column for a place where its group is not shown."""
    heading = heading_of(column, record)
    return f"{heading} {column[3]}" if column[3] in ("%", "ms") else heading


def table_rows(record: dict[str, Any], table: Table) -> tuple[list[str], list[list[str]]]:
    """Return one of a report's tables as column headings and rows of strings."""
    rows = [
        [
            label_in(table, row, record),
            *(f"{value} {beside}".strip() for value, beside in cells_of_row(row, table.columns)),
        ]
        for row in table.rows
    ]
    return ["net", *table.headings(record)], rows


def parity_rows(parity: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return a parity report as column headings and rows of strings, one row per step."""
    columns = [
        "step",
        "max difference",
        "mean difference",
        "relative",
        "same top-1 %",
        "cosine",
        "images",
        "first layer out of tolerance",
    ]
    rows = []
    for step in parity:
        agreement = step["top1_agreement"]
        rows.append(
            [
                f"{step['from']} → {step['to']}",
                scientific(step["max_abs_difference"]),
                scientific(step["mean_abs_difference"]),
                scientific(step["max_relative_difference"]),
                percent(None if agreement is None else 100 * agreement),
                MISSING if step["mean_cosine"] is None else fixed(step["mean_cosine"], 5),
                MISSING if step["images"] is None else fixed(step["images"], 0),
                step["first_diverging_layer"] or "none",
            ]
        )
    return columns, rows


def mode_rows(timings: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the timings of a bundle as column headings and rows of strings, one row per precision and mode."""
    energy = any(timing["energy"] for timing in timings)
    columns = ["precision, mode", "p50 ms", "p90 ms", "p99 ms", "mean ms", "images/s", "samples"]
    rows = []
    for timing in timings:
        latency = timing["latency_ms"]
        p50 = f"{milliseconds(latency['p50'])} {between(latency['ci95_p50'], milliseconds)}".strip()
        marks = f" ({', '.join(timing['marks'])})" if timing["marks"] else ""
        cells = [
            ", ".join(part for part in (timing["precision"], timing["mode"]) if part),
            p50 + marks,
            *(milliseconds(latency[key]) for key in ("p90", "p99", "mean")),
            per_second(timing["throughput_per_s"]),
            MISSING if timing["samples"] is None else fixed(timing["samples"], 0),
        ]
        if energy:
            cells.append(milliseconds(timing["energy"]["j_per_inference"] if timing["energy"] else None))
        rows.append(cells)
    return [*columns, "J/inference"] if energy else columns, rows


def energy_in_words(timings: Sequence[dict[str, Any]]) -> list[str]:
    """Say under which conditions energy was measured, once for each that differ."""
    said = []
    for timing in timings:
        energy = timing["energy"]
        if not energy:
            continue
        watts = [
            f"{milliseconds(energy[key])} W {word}"
            for key, word in (("idle_w", "idle"), ("load_w", "under load"))
            if energy[key] is not None
        ]
        how = [
            f"rails {', '.join(energy['rails'])}" if energy["rails"] else "",
            f"read from {energy['source']}" if energy["source"] else "",
            f"{fixed(energy['rate_hz'], 0)} times a second" if energy["rate_hz"] is not None else "",
        ]
        what = ", ".join(part for part in (timing["precision"], timing["mode"]) if part)
        said.append(
            f"Energy of {what}: " + "; ".join(part for part in (", ".join(watts), *how) if part) + "."
        )
    return list(dict.fromkeys(said))


def timing_groups(bundle: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return a bundle's timings by the conditions they share, in words, where any precision has several modes."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for timing in bundle["timings"]:
        threads = timing["threads"]
        parts = [
            timing["runtime"],
            timing["device"],
            timing["power_mode"],
            f"batch {timing['batch']}" if timing["batch"] else "",
            counted(threads, "thread") if isinstance(threads, int) else "",
        ]
        groups.setdefault(", ".join(str(part) for part in parts if part), []).append(timing)
    return [(words, found) for words, found in groups.items() if any(not one["headline"] for one in found)]


def comparison_rows(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the side-by-side comparison as column headings and rows of strings, one row per arm."""
    labels = comparison["labels_per_class"]
    heading = f"few-label ({labels}/class)" if labels is not None else "few-label"
    rows = []
    for arm in comparison["arms"]:
        few = arm["few_label"]
        accuracy = f"{percent(few['top1'])} {between(few['ci95'])}".strip() if few else MISSING
        rows.append([arm["name"], accuracy, percent(arm["knn_top1"]), percent(arm["linear_top1"])])
    return ["arm", f"{heading} %", "kNN %", "linear %"], rows


def diff_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return a comparison of two reports as column headings and rows of strings, one row per number compared.

    Args:
        record: what `diff` returns.
    """
    rows = []
    for row in record["rows"]:
        for check in row["checks"]:
            write = METRICS_OF_RULES[check["metric"]].write
            beside = [between(check[key], write) for key in ("old_ci95", "new_ci95")]
            rows.append(
                [
                    row["label"],
                    check["rule"] or check["metric"],
                    f"{write(check['old'])} {beside[0]}".strip(),
                    f"{write(check['new'])} {beside[1]}".strip(),
                    check["unit"],
                    _change(check),
                    check["words"] or _resolved_in_words(check["resolved"]),
                ]
            )
    return ["row", "rule" if record["rules"] else "metric", "OLD", "NEW", "", "change", ""], rows


def _change(check: dict[str, Any]) -> str:
    change, share = check["change"], check["change_percent"]
    if change is None:
        return MISSING
    if check["unit"] == "%":
        return f"{_signed(change, lambda value: fixed(value, 2))} points"
    if share is not None:
        return f"{_signed(share, lambda value: fixed(value, 1))} %"
    return _signed(change, METRICS_OF_RULES[check["metric"]].write)


def _signed(value: float, write: Callable[[float], str]) -> str:
    text = write(abs(value))
    return (MINUS if value < 0 and any(digit in text for digit in "123456789") else "+") + text


def _resolved_in_words(resolved: bool | None) -> str:
    return {True: "resolved", False: "within the intervals", None: ""}[resolved]


def diff_conditions(record: dict[str, Any]) -> list[str]:
    """Name the rows that only one side has, and the conditions that differ between the two."""
    lines = []
    for row in record["rows"]:
        if row["state"] != "in both":
            lines.append(f"{row['state']}: {row['label']}")
        for one in row["differ"]:
            was, now = (MISSING if one[key] is None else one[key] for key in ("old", "new"))
            lines.append(f"{row['label']}: {one['condition']} {was} → {now}")
    return lines


def markdown(record: dict[str, Any]) -> str:
    """Write the report in GitHub Markdown: decision, table, comparison, warnings and commands."""
    lines = [f"# {_escaped(record['title'])}", "", f"**{_escaped(record['decision'])}**", ""]
    for sentence in record["support"]:
        lines += [_escaped(sentence), ""]
    for table in tables_of(record):
        lines += [f"## {table.title}", "", *_markdown_table(*table_rows(record, table)), ""]
        for row in table.rows:
            about = net_of_row(row) if table.name == "nets" else conditions_of_row(row)
            lines.append(f"- {_escaped(label_in(table, row, record))}: {_escaped(about or 'nothing known')}")
        lines.append("")
    if record["rows"]:
        lines += ["Intervals are 95 %; – is not measured.", ""]
    for family in family_tables(record):
        lines += [f"## {_escaped(family.title)}", "", *_markdown_table(family.columns, family.rows), ""]
    for bundle in record["bundles"]:
        lines += _bundle_lines(bundle)
    for comparison in _comparisons(record):
        lines += [f"## Side by side{_of(comparison, record)}", ""]
        lines += [*_markdown_table(*comparison_rows(comparison)), ""]
        for one in comparison["differences"]:
            word = "resolved" if one["resolved"] else "not resolved"
            lines.append(
                f"- {_escaped(one['a'])} − {_escaped(one['b'])}: {points(one['mean'])} points "
                f"{between(one['ci95'])}, {word}".replace(" ,", ",")
            )
        lines.append("")
    if record["notes"]:
        lines += ["## Read with care", "", *(f"- {_escaped(note)}" for note in record["notes"]), ""]
    lines += ["## Commands", ""]
    for condition in record["conditions"]:
        lines.append(
            f"- {_escaped(condition['title'])}: {_code(condition['record'].get('command') or MISSING)}"
        )
    return "\n".join(lines) + "\n"


def _bundle_lines(bundle: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for words, timings in timing_groups(bundle):
        lines += [f"{_escaped(words)}:", "", *_markdown_table(*mode_rows(timings)), ""]
        lines += [f"- {_escaped(sentence)}" for sentence in energy_in_words(timings)]
        lines += [""] if lines[-1] else []
    if bundle["parity"]:
        lines += ["Parity, the same images through two forms of the net at each step:", ""]
        lines += [*_markdown_table(*parity_rows(bundle["parity"])), ""]
    return [f"## Bundle {_escaped(bundle['name'])}", "", *lines] if lines else []


def _comparisons(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in (record["comparison"], *record["further_comparisons"]) if one]


def _of(comparison: dict[str, Any], record: dict[str, Any]) -> str:
    return f": {_escaped(comparison['name'])}" if record["further_comparisons"] else ""


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(_escaped(column) for column in columns) + " |",
        "| --- |" + " ---: |" * (len(columns) - 1),
        *("| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows),
    ]


_MARKS = str.maketrans(
    {mark: "\\" + mark for mark in "\\`*_#|~$"}
    | {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ", "\r": " "}
)


def _escaped(text: object) -> str:
    """Write text so that Markdown shows it as it is; brackets stay bare unless they would make a link."""
    return printable(text).translate(_MARKS).replace("](", "]\\(")


def _code(text: object) -> str:
    """Write text as code, in more backticks than it holds in a row."""
    plain = " ".join(printable(text).splitlines())
    fence = "`"
    while fence in plain:
        fence += "`"
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{pad}{plain}{pad}{fence}"
