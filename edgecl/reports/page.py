"""Lay the report out as one HTML file that needs no network and no script.

Every word that came out of a record or a path goes through `_e`; only markup written in this file is markup.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgecl.reports.bundle_sections import bundle_sections
from edgecl.reports.families import family_tables
from edgecl.reports.figures.curves import curve_figure
from edgecl.reports.figures.dots import comparison_figure, difference_figure
from edgecl.reports.figures.drawing import BLUE, INK, MUTED, ORANGE, PURPLE
from edgecl.reports.figures.scatter import scatter_figure
from edgecl.reports.markup import captioned, detail_table
from edgecl.reports.markup import escaped as _e
from edgecl.reports.notation import MISSING, duration, finite, fixed, percent, points
from edgecl.reports.pareto import SIZES
from edgecl.reports.rows import (
    as_net,
    conditions_in_words,
    conditions_of_row,
    is_rejected,
    is_timed,
    net_of_row,
)
from edgecl.reports.text import (
    Table,
    cells_of_row,
    comparison_rows,
    heading_of,
    heading_with_unit,
    label_in,
    tables_of,
)

# Nothing may be fetched and nothing may run, whatever a name on the page looks like.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE_FILE = Path(__file__).with_name("page.css")


def page(record: dict[str, Any], *, views: Mapping[str, bytes]) -> str:
    """Write the report as HTML.

    Args:
        record: the content of report.json.
        views: name of a run -> its views.png.
    """
    sections = [
        _head(record),
        _tables(record),
        _comparisons(record),
        _scatter(record),
        _size_scatter(record),
        _families(record),
        bundle_sections(record),
        _runs(record),
        _views(views, record),
        _conditions(record),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{_e(record['title'])}</title>\n<style>\n{_STYLE_FILE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n<footer>{_e(record['made_by'])} · {_e(record['command'])}</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _head(record: dict[str, Any]) -> str:
    sentences = record["support"]
    support = f'<p class="support">{" ".join(map(_e, sentences))}</p>\n' if sentences else ""
    if len(sentences) > 4:
        items = "".join(f"<li>{_e(sentence)}</li>" for sentence in sentences)
        support = f'<ul class="support">{items}</ul>\n'
    return (
        f"<header>\n<h1>{_e(record['title'])}</h1>\n"
        f'<p class="decision">{_unbroken(record["decision"])}</p>\n' + support + "</header>"
    )


def _unbroken(sentence: str) -> str:
    """Write a sentence with its interval on one line."""
    text = _e(sentence)
    start, bracket, rest = text.partition("[")
    inside, end, after = rest.partition("]")
    return f'{start}<span class="nowrap">[{inside}]</span>{after}' if bracket and end else text


def _tables(record: dict[str, Any]) -> str:
    tables = tables_of(record)
    if not tables:
        return _notes(record)
    return (
        "<section>\n<h2>Accuracy, latency and size</h2>\n"
        '<p class="lead">Accuracies are on held-out pictures; brackets are 95 % intervals; '
        "– is not measured.</p>\n"
        + "".join(
            (f"<h3>{_e(table.title)}</h3>\n" if len(tables) > 1 else "") + _table(table, record)
            for table in tables
        )
        + f"{_notes(record)}</section>"
    )


def _table(table: Table, record: dict[str, Any]) -> str:
    groups: list[tuple[str, int]] = []
    for _, group, _, _ in table.columns:
        if groups and groups[-1][0] == group:
            groups[-1] = (group, groups[-1][1] + 1)
        else:
            groups.append((group, 1))
    headings = [heading_of(column, record) for column in table.columns]
    labels = [heading_with_unit(column, record).replace(" %", ", %") for column in table.columns]
    labels = [label.replace(" ms", ", ms") for label in labels]
    top = "".join(
        f'<th colspan="{span}" scope="colgroup"><span>{_e(group)}</span></th>' for group, span in groups
    )
    second = "".join(f'<th scope="col">{_e(heading)}</th>' for heading in headings)
    body = []
    for row in table.rows:
        about = net_of_row(row) if table.name == "nets" else conditions_of_row(row)
        small = _e(about).replace(" thread", "&nbsp;thread").replace("batch ", "batch&nbsp;")
        cells = "".join(
            f'<td data-label="{_e(label)}"{" class=missing" if value == MISSING else ""}>'
            f"<span>{_e(value)}{f'<small>{_e(beside)}</small>' if beside else ''}</span></td>"
            for label, (value, beside) in zip(labels, cells_of_row(row, table.columns), strict=True)
        )
        rejected = ' class="rejected"' if table.name == "bundles" and is_rejected(row) else ""
        body.append(
            f'<tr{rejected}><th scope="row">{_e(label_in(table, row, record))}'
            f"{f'<small>{small}</small>' if small else ''}</th>{cells}</tr>"
        )
    return (
        f'<table class="rows {table.name}">\n<thead>\n<tr class="groups"><th></th>{top}</tr>\n'
        f'<tr><th scope="col">net</th>{second}</tr>\n</thead>\n'
        "<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table>\n"
    )


def _notes(record: dict[str, Any]) -> str:
    if not record["notes"]:
        return ""
    return (
        '<ul class="notes">\n' + "\n".join(f"<li>{_e(note)}</li>" for note in record["notes"]) + "\n</ul>\n"
    )


def _comparisons(record: dict[str, Any]) -> str:
    found = [one for one in (record["comparison"], *record["further_comparisons"]) if one]
    parts = []
    for place, comparison in enumerate(found):
        title = "Side by side" if len(found) == 1 else f"Side by side: {comparison['name']}"
        parts.append(
            f"<section>\n<h2>{_e(title)}</h2>\n{_comparison(comparison, f'compare{place}')}</section>"
        )
    return "\n".join(parts)


def _comparison(comparison: dict[str, Any], prefix: str) -> str:
    draws, n_test = comparison["draws"], finite(comparison["n_test"])
    about = [
        f"each arm met the same {draws} draws of labels" if isinstance(draws, int) else "",
        f"{fixed(n_test, 0)} test pictures" if n_test is not None else "",
        f"test data {comparison['test']}" if comparison["test"] else "",
    ]
    lead = "; ".join(part for part in about if part)
    left = comparison_figure(comparison, prefix=prefix + "a")
    right = difference_figure(comparison, prefix=prefix + "d")
    charts = ""
    if left:
        charts += captioned(left, "Mean and 95 % interval; each faint dot is one draw of labels.")
    if right:
        charts += captioned(
            right,
            "Differences draw by draw, so that what all arms share cancels out; "
            "a hollow dot is not resolved: its interval reaches zero.",
        )
    columns, _ = comparison_rows(comparison)
    rows = [
        (
            arm["name"],
            percent(arm["few_label"]["top1"]) if arm["few_label"] else MISSING,
            _interval(arm["few_label"]["ci95"]) if arm["few_label"] and arm["few_label"]["ci95"] else "",
            percent(arm["knn_top1"]),
            percent(arm["linear_top1"]),
        )
        for arm in comparison["arms"]
    ]
    head = "".join(f'<th scope="col">{_e(column)}</th>' for column in columns)
    body = "\n".join(
        f'<tr><th scope="row">{_e(name)}</th><td><span>{_e(few)}<small>{_e(interval)}</small></span></td>'
        f"<td>{_e(knn)}</td><td>{_e(linear)}</td></tr>"
        for name, few, interval, knn, linear in rows
    )
    differences = "".join(
        f"<li>{_e(one['a'])} − {_e(one['b'])}: {_e(points(one['mean']))} points"
        f"{' ' + _e(_interval(one['ci95'])) if one['ci95'] else ''}, "
        f"{'resolved' if one['resolved'] else 'not resolved'}</li>"
        for one in comparison["differences"]
    )
    return (
        (f'<p class="lead">{_e(lead[0].upper() + lead[1:])}.</p>\n' if lead else "")
        + (f'<div class="pair">\n{charts}</div>\n' if charts else "")
        + f'<table class="compare">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n'
        + (f'<ul class="differences">{differences}</ul>\n' if differences else "")
    )


def _interval(interval: Sequence[float]) -> str:
    return f"[{percent(interval[0])}, {percent(interval[1])}]"


def _scatter(record: dict[str, Any]) -> str:
    trade = record["trade_off"]
    if not trade:
        return ""
    rows = record["rows"]
    caption = (
        "Up and to the left is better. Bars are 95 % intervals; "
        "filled dots and the dashed line are the Pareto front."
    )
    shown = [rows[index] for group in trade["groups"] for index in group["rows"]]
    precisions = {row["precision"] for row in shown if not is_rejected(row)}
    if len(precisions) > 1:
        shapes = {"fp32": "circles are fp32", "fp16": "squares fp16", "int8": "diamonds int8"}
        caption += f" {', '.join(words for key, words in shapes.items() if key in precisions).capitalize()}."
    if any(map(is_rejected, shown)):
        caption += " A cross is a precision whose decision is rejected: it is on no front."
    hollow = any(
        index not in group["front"] and not is_rejected(rows[index])
        for group in trade["groups"]
        for index in group["rows"]
    )
    if hollow:
        caption += " A hollow dot is beaten in both by another net."
    groups = trade["groups"]
    if len(groups) > 1:
        named = "; ".join(
            f"{('blue', 'orange', 'purple', 'green')[place % 4]}: {_group_in_words(group)}"
            for place, group in enumerate(groups)
        )
        caption += f" One front for each way of timing ({named})."
    else:
        caption += f" Timed on {_group_in_words(groups[0])}."
    lines = [line for group in groups for line in group["families"]]
    if lines:
        caption += f" {_joined(lines)}"
    svg = scatter_figure(rows, trade, families=record["families"], prefix="scatter")
    return (
        "<section>\n<h2>Accuracy against latency</h2>\n"
        f'<div class="single">\n{captioned(svg, caption)}</div>\n</section>'
    )


def _size_scatter(record: dict[str, Any]) -> str:
    trade = record["size_trade_off"]
    if not trade:
        return ""
    (group,) = trade["groups"]
    caption = (
        "Up and to the left is better. Bars are 95 % intervals; "
        "filled dots and the dashed line are the Pareto front."
    )
    if len(group["front"]) < len(group["rows"]):
        caption += " A hollow dot is beaten in both by another net."
    caption += f" {_joined(group['families'])} "
    caption += (
        "Fewer than two of them have a latency that counts"
        if any(map(is_timed, record["rows"]))
        else "Nothing was timed"
    )
    caption += ": `edgecl export` and `edgecl bench` put latency in the place of this."
    if trade["cost"] == "params":
        caption += " `edgecl cost MODEL_DIR` counts MACs, which say more about speed than parameters do."
    rows = [as_net(row) for row in record["rows"]]
    svg = scatter_figure(rows, trade, families=record["families"], prefix="size")
    return (
        f"<section>\n<h2>Accuracy against {SIZES[trade['cost']]}</h2>\n"
        f'<div class="single">\n{captioned(svg, caption)}</div>\n</section>'
    )


def _joined(lines: Sequence[dict[str, Any]]) -> str:
    """Say what the families' lines are; the first family's alone is solid."""
    which = (
        "A solid line joins" if {line["family"] for line in lines} == {0} else "The lines named above join"
    )
    return f"{which} the nets of one run, from the narrowest to the widest."


def _group_in_words(group: dict[str, Any]) -> str:
    return conditions_in_words(
        tuple(group[key] for key in ("device", "power_mode", "batch", "threads", "mode"))
    )


def _families(record: dict[str, Any]) -> str:
    tables = family_tables(record)
    if not tables:
        return ""
    return (
        "<section>\n<h2>Widths of one run</h2>\n"
        '<p class="lead">Nets that share one checkpoint: each is the leading part of the same host, with batch '
        "norms of its own.</p>\n"
        + "".join(
            f"<h3>{_e(table.title)}</h3>\n" + detail_table(table.columns, table.rows) for table in tables
        )
        + "</section>"
    )


_HOST, _SLIM = ORANGE, BLUE


def _runs(record: dict[str, Any]) -> str:
    parts = []
    for place, run in enumerate(record["runs"]):
        panels = "".join(f"<figure>{svg}</figure>\n" for svg in _panels(run, f"run{place}"))
        if not panels:
            continue
        title = "Training" if len(record["runs"]) == 1 else f"Training: {run['name']}"
        parts.append(
            f'<section>\n<h2>{_e(title)}</h2>\n<p class="lead">{_e(_run_in_words(run))}</p>\n'
            f'<div class="multiples">\n{panels}</div>\n</section>'
        )
    return "\n".join(parts)


def _run_in_words(run: dict[str, Any]) -> str:
    parts = [run["name"]]
    if run["arm"]:
        parts[0] += f" ({run['arm']})"
    if run["steps"] is not None:
        total = f" of {fixed(run['total_steps'], 0)}" if run["total_steps"] is not None else ""
        parts.append(f"{fixed(run['steps'], 0)}{total} steps")
    if run["wall_s"] is not None:
        parts.append(duration(run["wall_s"]))
    if run["state"] != "done":
        parts.append("failed" if run["state"] == "failed" else "not finished")
    text = ", ".join(parts) + "."
    if run["steps_per_point"] > 1:
        text += f" Lines are means of {run['steps_per_point']} logged steps, bands their extremes."
    return text


def _panels(run: dict[str, Any], prefix: str) -> Iterator[str]:
    curves = run["curves"]
    x_range = (run["from_epoch"], run["epochs"])

    def series(*wanted: tuple[str, str, str]) -> list[tuple[str, str, Any]]:
        return [(name, color, curves[key]) for key, name, color in wanted if key in curves]

    def narrower(kind: str) -> list[tuple[str, str, str]]:
        # "slim" is the widest of them.
        prefix = f"{kind}_slim_at_"
        keys = sorted((key for key in curves if key.startswith(prefix)), reverse=True)
        return [(key, f"{key.removeprefix(prefix)}\u00d7", MUTED) for key in keys]

    def colored(lines: dict[str, str]) -> list[tuple[str, str, str]]:
        others = itertools.cycle((PURPLE, _HOST, _SLIM, MUTED))
        return [(key, name, INK if key == "loss" else next(others)) for key, name in lines.items()]

    panels: list[tuple[list[tuple[str, str, Any]], dict[str, Any]]] = [
        *(
            (series(*colored(panel["lines"])), {key: panel[key] for key in ("title", "unit", "log")})
            for panel in run["panels"]
        ),
        (
            series(("diagonal", "diagonal", PURPLE)),
            {"title": "Diagonal of C", "unit": "mean, goal 1", "limits": (0.0, 1.0), "reference": 1.0},
        ),
        (
            series(("off_diagonal_rms", "off-diagonal", PURPLE)),
            {"title": "Off-diagonal of C", "unit": "RMS, goal 0", "limits": (0.0, None)},
        ),
        (
            series(("rankme_host", "host", _HOST), ("rankme_slim", "slim", _SLIM), *narrower("rankme")),
            {"title": "RankMe", "unit": "dimensions in use", "limits": (0.0, None)},
        ),
        (
            series(("knn_top1_host", "host", _HOST), ("knn_top1_slim", "slim", _SLIM), *narrower("knn_top1")),
            {"title": "kNN top-1", "unit": "%"},
        ),
        (
            series(("std", "std", PURPLE)),
            {"title": "Spread", "unit": "1 spread, 0 collapsed", "limits": (0.0, 1.0), "reference": 1.0},
        ),
        (
            series(("grad_norm_host", "host", _HOST), ("grad_norm_slim", "slim", _SLIM)),
            {"title": "Gradient norm", "log": True},
        ),
        (
            series(("lr", "lr", MUTED)),
            {"title": "Learning rate", "limits": (0.0, None)},
        ),
        (
            series(("images_per_s", "images/s", MUTED)),
            {"title": "Throughput", "unit": "images/s", "limits": (0.0, None)},
        ),
    ]
    for place, (lines, how) in enumerate(panels):
        if lines:
            unit = _e(how.pop("unit", ""))
            svg = curve_figure(lines, x_range=x_range, prefix=f"{prefix}p{place}", **how)
            yield f"<figcaption><b>{_e(how['title'])}</b>{unit and f' {unit}'}</figcaption>{svg}"


def _views(views: Mapping[str, bytes], record: dict[str, Any]) -> str:
    parts = []
    for name, content in views.items():
        data = base64.b64encode(content).decode("ascii")
        which = f"Run {name}: the" if len(record["runs"]) > 1 else "The"
        parts.append(
            '<figure><img class="views" alt="Sample pictures beside their two augmented views" '
            f'src="data:image/png;base64,{data}"><figcaption>'
            f"{_e(which)} pictures above, view A below them, view B at the bottom. "
            "Pretraining asks the nets to see the same thing in both views, and is told nothing else."
            "</figcaption></figure>"
        )
    if not parts:
        return ""
    return "<section>\n<h2>Pictures and their views</h2>\n" + "\n".join(parts) + "\n</section>"


# What each record says first: how it came to be.
_HEADER = ("command", "made_by", "made_from", "schema", "kind")


def _conditions(record: dict[str, Any]) -> str:
    parts = []
    for condition in record["conditions"]:
        content = condition["record"]
        made_from = _e(content.get("made_from") or MISSING)
        if condition["made_from_name"]:
            made_from += f" ({_e(condition['made_from_name'])})"
        rest = {key: value for key, value in content.items() if key not in _HEADER}
        parts.append(
            f"<details>\n<summary>{_e(condition['title'])} <span>{_e(condition['about'])}</span></summary>\n"
            "<dl>\n"
            f'<dt>command</dt><dd><code class="command">{_e(content.get("command") or MISSING)}</code></dd>\n'
            f"<dt>made by</dt><dd>{_e(content.get('made_by') or MISSING)}</dd>\n"
            f"<dt>made from</dt><dd>{made_from}</dd>\n"
            f"<dt>file</dt><dd>{_e(condition['file'])}</dd>\n"
            f"{_definitions(rest)}</dl>\n</details>"
        )
    return (
        "<section>\n<h2>Conditions</h2>\n"
        '<p class="lead">Every number above, with the command that made it, what it was made from, and the '
        "machine and versions it was made on. The same records stand in report.json.</p>\n"
        + "\n".join(parts)
        + "\n</section>"
    )


def _definitions(table: Mapping[str, Any]) -> str:
    lines = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            if value:
                lines.append(f"<dt>{_e(_label(key))}</dt><dd><dl>{_definitions(value)}</dl></dd>\n")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            inner = "".join(f"<dl>{_definitions(one)}</dl>" for one in value)
            lines.append(f"<dt>{_e(_label(key))}</dt><dd>{inner}</dd>\n")
        else:
            lines.append(f"<dt>{_e(_label(key))}</dt><dd>{_e(_value(value))}</dd>\n")
    return "".join(lines)


_UNITS = {"_s": "s", "_ms": "ms", "_mib": "MiB", "_w": "W", "_mj": "mJ", "_per_s": "per s"}


def _label(key: object) -> str:
    """Read a key aloud: `duration_s` is "duration, s"."""
    text = str(key)
    for ending in sorted(_UNITS, key=len, reverse=True):
        if text.endswith(ending):
            return f"{text.removesuffix(ending).replace('_', ' ')}, {_UNITS[ending]}"
    return text.replace("_", " ").replace("top1", "top-1").replace("ci95", "95 % interval")


def _value(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_value(one) for one in value[:24])
        return f"{shown}, … ({len(value):,} in all)" if len(value) > 24 else shown or "none"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_value(one)}" for key, one in value.items())
    return str(value)
