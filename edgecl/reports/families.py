"""Nets of several widths out of one checkpoint: which rows are one family, and its table and its lines in the chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgecl.errors import counted, printable
from edgecl.reports.collect import Collection, Source
from edgecl.reports.notation import MISSING, between, milliseconds, percent, scaled
from edgecl.reports.pareto import SIZES
from edgecl.reports.rows import (
    ACCURACIES,
    ORIGINS,
    Row,
    comparable_accuracies,
    conditions_in_words,
    conditions_key,
    is_rejected,
    is_timed,
    nets_of,
)

Family = dict[str, Any]


@dataclass(frozen=True)
class FamilyTable:
    """A family's nets, narrowest first, timed in one way: the columns' headings and rows of strings."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def families_of(collection: Collection, rows: Sequence[Row]) -> list[Family]:
    """Find the nets that came out of one checkpoint at two widths or more.

    Fine-tuned nets are a family of their own; where they came from shows only with the carved nets beside them.

    Returns:
        `name`, `arch`, `origin`, `checkpoint` (its hash), `widths`, narrowest first, and the indices of their `rows`.
    """
    models = {printable(model.path): model for model in collection.of("model")}
    found: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        model = models.get(row["model_dir"] or "")
        checkpoint = _checkpoint_of(model, collection) if model else None
        if model and checkpoint and row["width"] is not None:
            name = printable(model.record.get("recipe_name") or row["arch"])
            found.setdefault((checkpoint, row["arch"], row["origin"], name), []).append(index)
    families = []
    for (checkpoint, arch, origin, name), members in found.items():
        widths = sorted({rows[index]["width"] for index in members})
        if len(widths) > 1:
            families.append(
                {
                    "name": name if origin == "pretrained" else f"{name}, {ORIGINS.get(origin, origin)}",
                    "arch": arch,
                    "origin": origin,
                    "checkpoint": checkpoint,
                    "widths": widths,
                    "rows": members,
                }
            )
    names = [family["name"] for family in families]
    for family in families:
        if names.count(family["name"]) > 1:
            family["name"] += f" ({family['checkpoint'][:8]})"
    return families


def _checkpoint_of(model: Source, collection: Collection) -> str | None:
    """Return the hash of the checkpoint a net came from, through the nets it was fine-tuned from."""
    for _ in collection.sources:
        maker = collection.maker_of(model)
        if maker is None or maker.kind != "model":
            break
        model = maker
    made_from = model.record.get("made_from")
    return printable(made_from) if made_from else None


def lines_of(families: Sequence[Family], rows: Sequence[Row], shown: Sequence[int]) -> list[dict[str, Any]]:
    """Choose which of a chart's points to join: one family's nets by width, in one precision and runtime.

    Args:
        families: what `families_of` returns.
        rows: of the report.
        shown: indices of the rows that were timed in one way.

    Returns:
        `family` (its index) and `rows`, narrowest first. A rejected precision has no line.
    """
    lines: dict[tuple[Any, ...], list[int]] = {}
    for place, family in enumerate(families):
        for index in family["rows"]:
            row = rows[index]
            if index in shown and not is_rejected(row):
                lines.setdefault((place, row["precision"], row["runtime"], row["target"]), []).append(index)
    return [
        {"family": place, "rows": sorted(members, key=lambda index: rows[index]["width"])}
        for (place, *_), members in lines.items()
        if len({rows[index]["width"] for index in members}) > 1
    ]


def family_tables(record: dict[str, Any]) -> list[FamilyTable]:
    """Return the tables of a report's families: one for each way of timing, or one without latency.

    Args:
        record: what `report` returns, or report.json read back.
    """
    tables = []
    for family in record.get("families", []):
        rows = [record["rows"][index] for index in family["rows"]]
        nets = sorted(nets_of(rows), key=lambda row: row["width"])
        title = f"{family['name']}: {counted(len(family['widths']), 'width')} of one run"
        ways: list[Any] = list(dict.fromkeys(conditions_key(row) for row in rows if is_timed(row)))
        for way in ways or [None]:
            timed = [row for row in rows if is_timed(row) and conditions_key(row) == way]
            words = f", on {conditions_in_words(way)}" if way else ""
            tables.append(_table(title + words, nets, timed))
    return tables


def _table(title: str, nets: Sequence[Row], timed: Sequence[Row]) -> FamilyTable:
    known = {
        key: name.removesuffix(" top-1") for key, name in ACCURACIES.items() if any(net[key] for net in nets)
    }
    several = len({row["runtime"] for row in timed}) > 1
    forms = list(dict.fromkeys((row["precision"], row["runtime"]) for row in timed))
    columns = ["width", "params", "MACs", *(f"{name}, %" for name in known.values())]
    columns += [f"{precision} p50, ms" + (f", {runtime}" if several else "") for precision, runtime in forms]
    return FamilyTable(title, columns, [_cells(net, list(known), forms, timed) for net in nets])


def _cells(
    net: Row, known: Sequence[str], forms: Sequence[tuple[Any, Any]], timed: Sequence[Row]
) -> list[str]:
    cells = [f"{net['width']:g}×", scaled(net["params"]), scaled(net["macs"])]
    for key in known:
        one = net[key]
        cells.append(f"{percent(one['top1'])} {between(one['ci95'])}".strip() if one else MISSING)
    for form in forms:
        found = [
            row
            for row in timed
            if (row["precision"], row["runtime"]) == form and row["model_dir"] == net["model_dir"]
        ]
        cells.append(
            ", ".join(
                milliseconds(row["latency_ms"]["p50"]) + (" (rejected)" if is_rejected(row) else "")
                for row in found
            )
            or MISSING
        )
    return cells


def family_in_words(family: Family, rows: Sequence[Row]) -> str:
    """Say in a sentence what one run gave: how many nets, and widths, accuracies and sizes from end to end."""
    nets = sorted(nets_of([rows[index] for index in family["rows"]]), key=lambda row: row["width"])
    parts = []
    for key in comparable_accuracies(nets):
        if all(net[key] for net in nets):
            parts.append(_gains_in_words([(net["width"], net[key]["top1"]) for net in nets], ACCURACIES[key]))
            break
    for key, name in SIZES.items():
        if all(net[key] is not None for net in nets):
            parts.append(f"{scaled(nets[0][key])} to {scaled(nets[-1][key])} {name}")
            break
    low, high = family["widths"][0], family["widths"][-1]
    return (
        f"One run gave {counted(len(nets), 'net')} ({family['name']}), from width {low:g} to {high:g}"
        + (f": {', '.join(parts)}" if parts else "")
        + "."
    )


def _gains_in_words(gains: Sequence[tuple[float, float]], name: str) -> str:
    """Say the accuracy at the narrowest and at the widest width, and what lies between them and is beyond both."""
    (_, first), *inner, (_, last) = gains
    text = f"{percent(first)} to {percent(last)} % {name}"
    beyond = []
    for end, word in ((min, "as low as"), (max, "up to")):
        width, gain = end(gains, key=lambda one: one[1])
        # As written: what rounds to the same is not beyond.
        if (width, gain) in inner and percent(gain) not in (percent(first), percent(last)):
            beyond.append(f"{word} {percent(gain)} % at {width:g}")
    return f"{text} ({', '.join(beyond)})" if beyond else text
