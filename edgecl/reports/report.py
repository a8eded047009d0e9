"""From directories to a page and a text that a person can read, and a file of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgecl.reports.collect import collect
from edgecl.reports.content import Report, report_of
from edgecl.reports.render import markdown, page
from edgecl.storage.artifacts import ReportDir, new_directory, refuse_existing, write_bytes, write_json
from edgecl.storage.records import RunRecord


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
    return write_report(dirs, out=out, force=force).to_json()


def write_report(dirs: Sequence[Path], *, out: Path, force: bool = False) -> Report:
    """Do as `report`, and return what report.json holds as an object."""
    refuse_existing(out, force=force, kind=ReportDir.KIND)
    collection = collect([Path(path) for path in dirs])
    found = report_of(collection)
    views = {run.name: run.views_png for run in collection.of(RunRecord) if run.views_png}
    html = page(found, views=views)
    with new_directory(out, kind=ReportDir.KIND, force=force) as aside:
        files = ReportDir(aside)
        write_bytes(files.page_file, html.encode("utf-8"))
        write_bytes(files.text_file, markdown(found).encode("utf-8"))
        write_json(files.record_file, found.to_json())
    return found
