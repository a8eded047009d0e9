"""From directories to one page a person can read, one text and one file of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgecl.errors import printable
from edgecl.reports.collect import Collection, Source, collect
from edgecl.reports.comparison import comparison_of
from edgecl.reports.curves import MOST_POINTS, curves
from edgecl.reports.families import families_of, family_in_words, lines_of
from edgecl.reports.notation import finite
from edgecl.reports.page import page
from edgecl.reports.pareto import size_trade_off, trade_off
from edgecl.reports.precisions import bundle_record
from edgecl.reports.rows import ORIGINS, rows_of
from edgecl.reports.sentences import decision_of, plateaus_in_words, warnings_of
from edgecl.reports.text import markdown
from edgecl.storage.directories import ReportDir
from edgecl.storage.raw_records import record_header
from edgecl.storage.reading import RECORD_FILES, reading
from edgecl.storage.writing import new_directory, refuse_existing, write_bytes, write_json

_RECORD_FILES = {**RECORD_FILES, "comparison": "comparison.json"}
# Logged of every method; what else a method logs, it says itself, in the panels of its run.
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
# Of the slim nets narrower than the widest.
FURTHER_WIDTHS = ("rankme_slim_at_", "knn_top1_slim_at_")
_QUALITY_KEYS = ("rankme_host", "rankme_slim", "knn_top1_host", "knn_top1_slim")


def report(dirs: Sequence[Path], *, out: Path, force: bool = False) -> dict[str, Any]:
    """Write report.html, report.md and report.json about runs, nets, bundles and whole pipelines.

    Args:
        dirs: run, model, bundle or pipeline directories in any mix; a pipeline stands for all that it holds.
        out: directory of the report.
        force: replace an earlier report.

    Returns:
        The content of report.json: `decision`, `rows`, `comparison`, `trade_off`, `runs`, `notes` and more.

    Raises:
        ArtifactError: a directory edgecl did not write, an unreadable record, or an output in the way.
    """
    refuse_existing(out, force=force, kind=ReportDir.KIND)
    collection = collect([Path(path) for path in dirs])
    record = report_record(collection)
    views = {run.name: run.views_png for run in collection.of("run") if run.views_png}
    text = page(record, views=views)
    with new_directory(out, kind=ReportDir.KIND, force=force) as aside:
        files = ReportDir(aside)
        write_bytes(files.page_file, text.encode("utf-8"))
        write_bytes(files.text_file, markdown(record).encode("utf-8"))
        write_json(files.record_file, record)
    return record


def report_record(collection: Collection) -> dict[str, Any]:
    """Make the content of report.json: every number the page shows, and the records behind them."""
    rows = rows_of(collection)
    comparisons = [_made(comparison_of, one, collection) for one in collection.of("comparison")]
    families = families_of(collection, rows)
    trade = trade_off(rows)
    for group in trade["groups"] if trade else []:
        group["families"] = lines_of(families, rows, group["rows"])
    joined = any(group["families"] for group in trade["groups"]) if trade else False
    bundles = [_made(bundle_record, bundle) for bundle in collection.of("bundle")]
    decision, support = decision_of(comparisons, rows, bundles, collection)
    stuck, what_to_change = plateaus_in_words(collection.of("run"))
    header = record_header("report", made_from=collection.sha256())
    record = {
        **header,
        "title": _title(collection),
        "decision": " ".join([*stuck, decision]),
        "support": [*what_to_change, *support, *(family_in_words(family, rows) for family in families)],
        "rows": rows,
        "bundles": bundles,
        "comparison": comparisons[0] if comparisons else None,
        "further_comparisons": comparisons[1:],
        "trade_off": trade,
        "size_trade_off": None if joined else size_trade_off(rows, families),
        "families": families,
        "runs": [_made(_run, run) for run in collection.of("run")],
        "notes": [*collection.notes, *warnings_of(rows, collection)],
        "conditions": _conditions(collection),
    }
    plain: dict[str, Any] = _plain(record)
    return plain


def _made(part: Callable[..., dict[str, Any]], source: Source, *more: Any) -> dict[str, Any]:
    """Make a part of the report from one source; a record that does not fit is named."""
    with reading(source.path / _RECORD_FILES[source.kind]):
        return part(source, *more)


def _title(collection: Collection) -> str:
    for kind in ("pipeline", "run"):
        names = [source.record.get("recipe_name") for source in collection.of(kind)]
        if names and names[0]:
            return f"edgecl report: {printable(names[0])}" + (" and others" if len(set(names)) > 1 else "")
    names = [source.name for source in collection.sources]
    return f"edgecl report: {names[0]}" + (" and others" if len(names) > 1 else "")


def _run(run: Source) -> dict[str, Any]:
    record = run.record
    total = finite(record.get("total_steps"))
    per_epoch = finite(record.get("steps_per_epoch"))
    # As floats: matplotlib takes no whole number of more than 64 bits.
    at = [float(line["epoch"]) for line in (*run.steps, *run.quality)]
    first, last = min(at, default=0.0), max(at, default=1.0)
    planned = total / per_epoch if total is not None and per_epoch else None
    # The axis ends where the plan ends, so that an unfinished run looks unfinished; it begins at zero unless
    # the run went on from a checkpoint so late that its own part would be a sliver.
    epochs = max(planned or 0.0, last) or 1.0
    panels = _panels(record)
    own = [key for panel in panels for key in panel["lines"]]
    return {
        "name": run.name,
        "arm": printable(record["arm"]) if record.get("arm") else None,
        "recipe_name": record.get("recipe_name"),
        "state": record.get("state"),
        "wall_s": finite(record.get("wall_s")),
        "steps": finite(run.steps[-1]["step"]) if run.steps else None,
        "total_steps": total,
        "from_epoch": float(math.floor(first)) if 0.25 * epochs < first < epochs else 0.0,
        "epochs": epochs,
        "steps_per_point": max(1, -(-len(run.steps) // MOST_POINTS)),
        "panels": panels,
        "curves": {
            **curves(run.steps, tuple(dict.fromkeys([*_STEP_KEYS, *own]))),
            **curves(run.quality, _quality_keys(run.quality)),
        },
    }


def _panels(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the panels that a run's method asks for: title, unit, log, and the name of each key's line.

    A name longer than a chart has room for is cut.
    """
    found = []
    for panel in record.get("panels") or []:
        lines = panel.get("lines") if isinstance(panel, dict) else None
        if isinstance(lines, dict):
            found.append(
                {
                    "title": printable(panel.get("title"))[:60],
                    "unit": printable(panel.get("unit") or "")[:20],
                    "log": panel.get("log") is True,
                    "lines": {key: printable(name)[:24] for key, name in lines.items()},
                }
            )
    return found or [{"title": "Loss", "unit": "", "log": True, "lines": {"loss": "total"}}]


def _conditions(collection: Collection) -> list[dict[str, Any]]:
    result = []
    for source in collection.sources:
        maker = collection.maker_of(source)
        files = [(_RECORD_FILES[source.kind], source.record, maker.name if maker else None)]
        files += [(name, record, source.name) for name, record in sorted(source.beside.items())]
        for name, record, made_from_name in files:
            result.append(
                {
                    "title": f"{source.name}/{name}" if source.name else name,
                    "about": _ABOUT.get(name.partition("-")[0].removesuffix(".json"), "") or _about(source),
                    "file": printable(source.path / name),
                    "made_from_name": made_from_name if record.get("made_from") else None,
                    "record": record,
                }
            )
    return result


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
    return f"{ORIGINS.get(origin, origin)} net" if isinstance(origin, str) else source.kind


def _plain(value: Any) -> Any:
    """Copy a record so that it can be shown and written as strict JSON: not-a-number is null, text is printable."""
    if isinstance(value, dict):
        return {printable(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return printable(value) if isinstance(value, str) else value


def _quality_keys(lines: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return what to draw of quality: of host and slim net, and of each further width that the lines have."""
    further = {key for line in lines for key in line if key.startswith(FURTHER_WIDTHS)}
    return (*_QUALITY_KEYS, *sorted(further, reverse=True))
