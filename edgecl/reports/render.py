"""Lay a report out as one HTML file that needs no network and no script, and as GitHub Markdown.

The templates escape whatever is put into them: markupsafe for HTML, `_markdown` for Markdown.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from edgecl.reports.content import Inspection, Report, RunSummary
from edgecl.reports.families import family_tables
from edgecl.reports.figures.curves import panel_figure
from edgecl.reports.figures.dots import comparison_figure, difference_figure
from edgecl.reports.figures.drawing import BLUE, INK, MUTED, ORANGE, PURPLE
from edgecl.reports.figures.inspections import classes_shown, confusion_figure, map_figure
from edgecl.reports.figures.scatter import scatter_figure
from edgecl.reports.notation import MISSING
from edgecl.reports.pareto import SIZES, TradeOff
from edgecl.reports.precisions import joined
from edgecl.reports.rows import Comparison, Row
from edgecl.reports.tables import comparison_table, mode_tables, parity_table, precision_table, report_tables


@dataclass(frozen=True)
class Chart:
    """A drawing with its title and its caption."""

    svg: Markup
    caption: str
    title: str = ""


def page(report: Report, *, views: Mapping[str, bytes], pictures: Mapping[str, Sequence[str]]) -> str:
    """Return the report as HTML, with each run's views.png, and each net's mistakes as JPEGs in base64."""
    return render(
        "report.html.j2",
        report=report,
        comparison_charts=[
            list(_comparison_charts(one, f"compare{i}")) for i, one in enumerate(report.comparisons)
        ],
        scatters=list(_scatters(report)),
        inspection_charts=[
            list(_inspection_charts(one, f"inspect{i}")) for i, one in enumerate(report.inspections)
        ],
        pictures=pictures,
        run_charts=[list(run_charts(run, f"run{i}")) for i, run in enumerate(report.runs)],
        views={name: base64.b64encode(png).decode("ascii") for name, png in views.items()},
    )


def markdown(report: Report) -> str:
    """Return the report in GitHub Markdown: decision, tables, comparisons, warnings and commands."""
    return render("report.md.j2", escape=_markdown, report=report)


def render(template: str, *, escape: Callable[[object], Markup] | None = None, **content: Any) -> str:
    """Fill in a template of this folder; everything put into it is escaped, as HTML unless told otherwise."""
    loader = PackageLoader("edgecl.reports")
    env = Environment(
        loader=loader,
        autoescape=True,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    env.filters.update(label=_label, value=_value, with_whole_interval=_with_whole_interval, code=_code)
    env.tests["list_of_tables"] = _is_list_of_tables
    tables = (report_tables, family_tables, precision_table, mode_tables, parity_table, comparison_table)
    env.globals.update({table.__name__: table for table in tables})
    style = Markup(loader.get_source(env, "page.css")[0])
    return env.get_template(template).render(style=style, **content)


def _comparison_charts(comparison: Comparison, prefix: str) -> Iterator[Chart]:
    if svg := comparison_figure(comparison, prefix=prefix + "a"):
        yield Chart(Markup(svg), "Mean and 95 % interval; each faint dot is one choice of labels.")
    if svg := difference_figure(comparison, prefix=prefix + "d"):
        yield Chart(
            Markup(svg),
            "Differences on the same labels, so that what all nets share cancels out; a hollow dot is not resolved: "
            "its interval reaches zero.",
        )


def _scatters(report: Report) -> Iterator[Chart]:
    if trade := report.trade_off:
        svg = scatter_figure(report.rows, trade, families=report.families, prefix="scatter")
        yield Chart(Markup(svg), _caption(trade, report.rows), "Accuracy against latency")
    if trade := report.size_trade_off:
        rows = [row.without_bundle() for row in report.rows]
        svg = scatter_figure(rows, trade, families=report.families, prefix="size")
        is_timed = any(row.is_timed for row in report.rows)
        why = "Fewer than two of them have a latency that counts" if is_timed else "Nothing was timed"
        caption = f"{_caption(trade, rows)} {why}: `edgecl export` and `edgecl bench` put latency in the place of this."
        if trade.cost == "params":
            caption += " `edgecl cost MODEL_DIR` counts MACs, which say more about speed than parameters do."
        yield Chart(Markup(svg), caption, f"Accuracy against {SIZES[trade.cost]}")


def _inspection_charts(inspection: Inspection, prefix: str) -> Iterator[Chart]:
    shown, every = len(classes_shown(inspection)), len(inspection.classes)
    some = f" Of {every:,} classes the {shown} that are confused most." if shown < every else ""
    yield Chart(
        Markup(confusion_figure(inspection, prefix=prefix + "c")),
        f"Rows are true classes, columns predicted ones; the darker, the larger the share of the row.{some}",
        "Classes against predicted classes",
    )
    yield Chart(
        Markup(map_figure(inspection, prefix=prefix + "m")),
        f"{len(inspection.map.x):,} held-out images by the net's features ({inspection.map.made_by}): what lies together "
        f"looks alike to it.{some}",
        "Features in the plane",
    )


def _caption(trade: TradeOff, rows: list[Row]) -> str:
    """Return how to read a scatter: its bars, shapes, colors and lines."""
    parts = [
        "Up and to the left is better. Bars are 95 % intervals; filled dots and the dashed line are the Pareto front."
    ]
    shown = [rows[index] for index in trade.members]
    precisions = {row.precision for row in shown if not row.is_rejected}
    if len(precisions) > 1:
        shapes = {"fp32": "circles are fp32", "fp16": "squares fp16", "int8": "diamonds int8"}
        named = joined(*(words for key, words in shapes.items() if key in precisions))
        parts.append(f"{named.capitalize()}.")
    if any(row.is_rejected for row in shown):
        parts.append("A cross is a precision whose decision is rejected: it is on no front.")
    front = {index for group in trade.groups for index in group.front}
    if any(index not in front and not rows[index].is_rejected for index in trade.members):
        parts.append("A hollow dot is beaten in both by another net.")
    if len(trade.groups) > 1:
        colors = itertools.cycle(("blue", "orange", "purple", "green"))
        named = "; ".join(
            f"{color}: {group.in_words}" for color, group in zip(colors, trade.groups, strict=False)
        )
        parts.append(f"One front for each way of timing ({named}).")
    elif trade.cost == "latency":
        parts.append(f"Timed on {trade.groups[0].in_words}.")
    if trade.lines:
        # The first family's line alone is solid.
        solid = {line.family for line in trade.lines} == {0}
        which = "A solid line joins" if solid else "The lines named above join"
        parts.append(f"{which} the nets of one run, from the narrowest to the widest.")
    return " ".join(parts)


def run_charts(run: RunSummary, prefix: str) -> Iterator[Chart]:
    """Draw the panels of a run that have a curve."""
    epochs = (run.from_epoch, run.epochs)
    for place, panel in enumerate(run.panels):
        others = itertools.cycle((PURPLE, ORANGE, BLUE, MUTED))
        series = []
        for key, name in panel.lines.items():
            if key in run.curves:
                color = _COLORS.get(key) or _COLORS.get(name) or (MUTED if "_at_" in key else next(others))
                series.append((name, color, run.curves[key]))
        if series:
            svg = panel_figure(series, panel, x_range=epochs, prefix=f"{prefix}p{place}")
            yield Chart(Markup(svg), panel.unit, panel.title)


_COLORS = {"loss": INK, "host": ORANGE, "slim": BLUE, "lr": MUTED, "images_per_s": MUTED}

_UNITS = {"_per_s": "per s", "_mib": "MiB", "_ms": "ms", "_mj": "mJ", "_s": "s", "_w": "W"}


def _label(key: str) -> str:
    """Write a record's key for a reader: `duration_s` is "duration, s"."""
    for ending, unit in _UNITS.items():
        if key.endswith(ending):
            return f"{key.removesuffix(ending).replace('_', ' ')}, {unit}"
    return key.replace("_", " ").replace("top1", "top-1").replace("ci95", "95 % interval")


def _value(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        shown = ", ".join(_value(one) for one in value[:24])
        return f"{shown}, … ({len(value):,} in all)" if len(value) > 24 else shown or "none"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_value(one)}" for key, one in value.items())
    return str(value)


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _with_whole_interval(sentence: str) -> Markup:
    """Keep a sentence's first interval on one line."""
    return Markup(re.sub(r"\[[^\]]*\]", r'<span class="nowrap">\g<0></span>', str(escape(sentence)), count=1))


_SIGNS = str.maketrans(
    {sign: "\\" + sign for sign in "\\`*_#|~$"}
    | {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ", "\r": " "}
)


def _markdown(value: object) -> Markup:
    """Escape text so that Markdown shows it as it is; brackets stay bare unless they would make a link."""
    return value if isinstance(value, Markup) else Markup(str(value).translate(_SIGNS).replace("](", "]\\("))


def _code(text: str) -> Markup:
    """Write text as Markdown's code, in more backticks than it holds in a row."""
    plain = " ".join(text.splitlines())
    fence = "`"
    while fence in plain:
        fence += "`"
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return Markup(f"{fence}{pad}{plain}{pad}{fence}")
