"""The report's table as strings, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgecl.report.notation import (
    MISSING,
    between,
    megabytes,
    milliseconds,
    per_second,
    percent,
    points,
    scaled,
)
from edgecl.report.rows import conditions_of_row, net_of_row, row_label

# Heading of a group, heading of the column, and its unit.
COLUMNS = (
    ("Accuracy, top-1 %", "few-label", "%"),
    ("Accuracy, top-1 %", "kNN", "%"),
    ("Accuracy, top-1 %", "linear", "%"),
    ("Accuracy, top-1 %", "fine-tuned", "%"),
    ("Latency, ms", "p50", "ms"),
    ("Latency, ms", "p90", "ms"),
    ("Latency, ms", "p99", "ms"),
    ("Speed", "images/s", "/s"),
    ("Size", "MACs", ""),
    ("Size", "params", ""),
    ("Size", "ONNX MB", "MB"),
)


def cells_of_row(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Write a row as (value, interval) strings, one pair for each of COLUMNS."""
    latency = row["latency_ms"] or {}
    accuracies = [row[key] for key in ("few_label", "knn", "linear", "finetuned")]
    return [
        *((percent(one["top1"]), between(one["ci95"])) if one else (MISSING, "") for one in accuracies),
        (milliseconds(latency.get("p50")), between(latency.get("ci95_p50"), milliseconds)),
        (milliseconds(latency.get("p90")), ""),
        (milliseconds(latency.get("p99")), ""),
        (per_second(row["throughput_per_s"]), ""),
        (scaled(row["macs"]), ""),
        (scaled(row["params"]), ""),
        (megabytes(row["onnx_bytes"]), ""),
    ]


def few_label_heading(record: dict[str, Any]) -> str:
    """Name the few-label column, with the labels per class where all rows agree on them."""
    counts = {str(row["few_label"]["labels_per_class"]) for row in record["rows"] if row["few_label"]}
    return f"few-label ({counts.pop()}/class)" if len(counts) == 1 else "few-label"


def table_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the table of a report as column headings and rows of strings, one row per net and bundle.

    Args:
        record: what `report` returns, or report.json read back.
    """
    columns = ["net"]
    for group, heading, _ in COLUMNS:
        if heading == "few-label":
            heading = few_label_heading(record)
        columns.append(
            {"Accuracy, top-1 %": f"{heading} %", "Latency, ms": f"{heading} ms"}.get(group, heading)
        )
    rows = [
        [
            row_label(row, record["rows"]),
            *(f"{value} {interval}".strip() for value, interval in cells_of_row(row)),
        ]
        for row in record["rows"]
    ]
    return columns, rows


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


def markdown(record: dict[str, Any]) -> str:
    """Write the report in GitHub Markdown: verdict, table, comparison, warnings and commands."""
    lines = [f"# {_escaped(record['title'])}", "", f"**{_escaped(record['verdict'])}**", ""]
    for sentence in record["support"]:
        lines += [_escaped(sentence), ""]
    if record["rows"]:
        columns, rows = table_rows(record)
        lines += [*_markdown_table(columns, rows), ""]
        lines += ["Intervals are 95 %; – is not measured.", ""]
        for row in record["rows"]:
            about = "; ".join(part for part in (net_of_row(row), conditions_of_row(row)) if part)
            lines.append(
                f"- {_escaped(row_label(row, record['rows']))}: {_escaped(about or 'nothing known')}"
            )
        lines.append("")
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
    return str(text).translate(_MARKS).replace("](", "]\\(")


def _code(text: object) -> str:
    """Write text as code, in more backticks than it holds in a row."""
    plain = " ".join(str(text).splitlines())
    fence = "`"
    while fence in plain:
        fence += "`"
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{pad}{plain}{pad}{fence}"
