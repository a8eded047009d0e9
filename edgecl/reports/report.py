"""From directories to a page and a text that a person can read, and a file of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgecl.reports.collect import collect
from edgecl.reports.content import Report, inspected, report_of
from edgecl.reports.render import markdown, page
from edgecl.storage.directories import ReportDir
from edgecl.storage.outputs import new_directory, refuse_existing
from edgecl.storage.record_files import write_record
from edgecl.storage.records import RunRecord
from edgecl.storage.writing import write_bytes


def report(dirs: Sequence[Path], *, out: Path, force: bool = False) -> Report:
    """Write report.html, report.md and report.json about runs, nets, bundles and whole pipelines.

    `edgecl.report` tells arguments, result and errors.
    """
    refuse_existing(out, force=force, kind=ReportDir.KIND)
    collection = collect(dirs)
    found = report_of(collection)
    views = {run.name: run.views_png for run in collection.of(RunRecord) if run.views_png}
    pictures = {one.name: [each.picture for each in record.mistakes] for one, record in inspected(collection)}
    html = page(found, views=views, pictures=pictures)
    with new_directory(out, kind=ReportDir.KIND, force=force) as aside:
        files = ReportDir(aside)
        write_bytes(files.page_file, html.encode("utf-8"))
        write_bytes(files.text_file, markdown(found).encode("utf-8"))
        write_record(files.record_file, found)
    return found
