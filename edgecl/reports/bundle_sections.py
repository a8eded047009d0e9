"""The page's section about each bundle: what became of its precisions, its modes, its parity ladder."""

from __future__ import annotations

from typing import Any

from edgecl.reports.markup import detail_table, escaped
from edgecl.reports.notation import MISSING, megabytes, percent, scientific
from edgecl.reports.precisions import REJECTED, verdict_in_short, verdict_in_words
from edgecl.reports.text import energy_in_words, ladder_rows, mode_rows, timing_groups


def bundle_sections(record: dict[str, Any]) -> str:
    """Write a section for every bundle that holds several precisions, modes or a ladder."""
    parts = []
    for bundle in record["bundles"]:
        content = _precisions(bundle) + _ratios(bundle) + _modes(bundle) + _ladder(bundle)
        if content:
            title = f"Bundle {bundle['name']}" + (f", for {bundle['target']}" if bundle["target"] else "")
            parts.append(f"<section>\n<h2>{escaped(title)}</h2>\n{content}</section>")
    return "\n".join(parts)


def _precisions(bundle: dict[str, Any]) -> str:
    found = bundle["precisions"]
    if len(found) < 2 and not any(one["verdict"] for one in found):
        return ""
    columns = [
        "precision",
        "form",
        "opset",
        "ONNX MB",
        "relative difference",
        "same top-1 %",
        "verify",
        "verdict",
    ]
    rows = []
    for one in found:
        agreement = one["top1_agreement"]
        rows.append(
            [
                one["precision"] + (" (default)" if one["default"] else ""),
                one["form"] or MISSING,
                str(one["opset"] or MISSING),
                megabytes(one["file_bytes"]),
                scientific(one["max_relative_difference"]),
                percent(None if agreement is None else 100 * agreement),
                {True: "passed", False: "failed", None: MISSING}[one["verified"]],
                verdict_in_short(one["verdict"]) or "not judged",
            ]
        )
    verdicts = "".join(
        f"<li{' class=rejected' if one['verdict']['state'] == REJECTED else ''}><b>{escaped(one['precision'])}</b> "
        f"{escaped(verdict_in_words(one['verdict']))}</li>"
        for one in found
        if one["verdict"]
    )
    return detail_table(columns, rows) + (f'<ul class="verdicts">{verdicts}</ul>\n' if verdicts else "")


def _ratios(bundle: dict[str, Any]) -> str:
    if not bundle["ratios"]:
        return ""
    lines = "".join(
        f"<li>{escaped(one['words'])}"
        f"{escaped(' on ' + one['device']) if one['device'] else ''}"
        f"{escaped(', ' + one['runtime']) if one['runtime'] else ''}</li>"
        for one in bundle["ratios"]
    )
    return (
        "<h3>Speed of precisions timed in turns</h3>\n"
        '<p class="lead">Ratios of median latencies from one session that went back and forth between the '
        f'precisions; brackets are 95 % intervals.</p>\n<ul class="ratios">{lines}</ul>\n'
    )


def _modes(bundle: dict[str, Any]) -> str:
    parts = []
    for words, timings in timing_groups(bundle):
        energy = "".join(f"<li>{escaped(sentence)}</li>" for sentence in energy_in_words(timings))
        parts.append(
            f'<p class="lead">{escaped(words)}.</p>\n{detail_table(*mode_rows(timings))}'
            + (f'<ul class="ratios">{energy}</ul>\n' if energy else "")
        )
    return "<h3>Every mode that was timed</h3>\n" + "".join(parts) if parts else ""


def _ladder(bundle: dict[str, Any]) -> str:
    if not bundle["ladder"]:
        return ""
    return (
        "<h3>Parity ladder</h3>\n"
        '<p class="lead">The same real images through two forms of the net at each step. Differences are of '
        "outputs; relative ones are to the largest output.</p>\n"
        + detail_table(*ladder_rows(bundle["ladder"]))
    )
