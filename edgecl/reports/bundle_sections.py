"""The page's section about each bundle: what became of its precisions, its modes, its parity report."""

from __future__ import annotations

from typing import Any

from edgecl.reports.markup import detail_table, escaped
from edgecl.reports.notation import MISSING, megabytes, percent, scientific
from edgecl.reports.precisions import REJECTED, decision_in_short, decision_in_words
from edgecl.reports.text import energy_in_words, mode_rows, parity_rows, timing_groups


def bundle_sections(record: dict[str, Any]) -> str:
    """Write a section for every bundle that holds several precisions, modes or a parity report."""
    parts = []
    for bundle in record["bundles"]:
        content = _precisions(bundle) + _ratios(bundle) + _modes(bundle) + _parity(bundle)
        if content:
            title = f"Bundle {bundle['name']}" + (f", for {bundle['target']}" if bundle["target"] else "")
            parts.append(f"<section>\n<h2>{escaped(title)}</h2>\n{content}</section>")
    return "\n".join(parts)


def _precisions(bundle: dict[str, Any]) -> str:
    found = bundle["precisions"]
    if len(found) < 2 and not any(one["decision"] for one in found):
        return ""
    columns = [
        "precision",
        "form",
        "opset",
        "ONNX MB",
        "relative difference",
        "same top-1 %",
        "verify",
        "decision",
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
                decision_in_short(one["decision"]) or "not evaluated",
            ]
        )
    decisions = "".join(
        f"<li{' class=rejected' if one['decision']['state'] == REJECTED else ''}><b>{escaped(one['precision'])}</b> "
        f"{escaped(decision_in_words(one['decision']))}</li>"
        for one in found
        if one["decision"]
    )
    return detail_table(columns, rows) + (f'<ul class="decisions">{decisions}</ul>\n' if decisions else "")


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


def _parity(bundle: dict[str, Any]) -> str:
    if not bundle["parity"]:
        return ""
    return (
        "<h3>Parity report</h3>\n"
        '<p class="lead">The same real images through two forms of the net at each step. Differences are of '
        "outputs; relative ones are to the largest output.</p>\n"
        + detail_table(*parity_rows(bundle["parity"]))
    )
