"""edgecl report: accuracy, latency and size side by side, on one page; and what changed since another one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
import typer.main

from edgecl.cli.options import ForceOption, JsonOption

if TYPE_CHECKING:
    from edgecl.reports.content import Report
    from edgecl.reports.diff import Diff
    from edgecl.reports.tables import Table


def report_command(
    dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Run, model, bundle or pipeline directories.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory to write the report to.", show_default=False)],
    json_: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Write one page about nets, their bundles and their runs.

    `edgecl report diff OLD NEW` compares two reports; see `edgecl report diff --help`.
    """
    from edgecl.cli.output import print_json, print_line
    from edgecl.reports.report import report
    from edgecl.storage.directories import ReportDir

    found = report(dirs, out=out, force=force)
    if json_:
        print_json(found.to_json())
        return
    print_report(found)
    print_line(f"report: {ReportDir(out).page_file}")


def diff_command(
    old: Annotated[
        Path,
        typer.Argument(
            metavar="OLD",
            help="A report's directory or report.json, or a run, model, bundle or pipeline directory.",
            show_default=False,
        ),
    ],
    new: Annotated[
        Path, typer.Argument(metavar="NEW", help="The same, to be evaluated.", show_default=False)
    ],
    fail_on: Annotated[
        str | None,
        typer.Option(
            "--fail-on",
            metavar="RULES",
            help='What is a regression, such as "p50>+5%,top1<-0.5".',
            show_default=False,
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Compare two reports row by row; exit 1 where a rule of --fail-on is broken.

    A rule is METRIC>LIMIT or METRIC<LIMIT. With a sign the limit is a change from OLD to NEW, in percent of OLD
    or in the metric's own unit: p50>+5%, top1<-0.5 (points). Without a sign it is a value of NEW: p50>2.0 (ms).

    Metrics: p50, p90, p99, mean (ms), throughput (images/s), j_per_inference (J), top1, knn, linear, few_label
    (%), size (MB), macs, params.

    The point estimate decides; where the 95 % intervals of OLD and NEW overlap, that is said beside it. A row or
    number that OLD has and NEW lacks breaks every rule that concerns it. A rule that concerns no row is an error.

    Exit 0: no rule broken. 1: a rule broken, or an error. 2: a rule that cannot be read.
    """
    from edgecl.cli.output import print_json
    from edgecl.reports.diff import diff
    from edgecl.reports.rules import RuleError, parse_rules

    try:
        rules = [] if fail_on is None else parse_rules(fail_on)
    except RuleError as problem:
        raise typer.BadParameter(str(problem), param_hint="--fail-on") from problem
    found = diff(old, new, rules=rules)
    if json_:
        print_json(found.to_json())
    else:
        print_diff(found)
    if found.regression:
        raise typer.Exit(1)


_diff_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_diff_app.command("diff")(diff_command)


class ReportCommand(typer.core.TyperCommand):
    """`report DIR ...`, unless the first word is `diff`; a directory of that name is written ./diff."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Read the words of `report`, or hand those after `diff` to the other command."""
        if args[:1] == ["diff"]:
            command = typer.main.get_command(_diff_app)
            return command.make_context(f"{info_name} diff", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)


def print_report(report: "Report") -> None:
    """Print a report's decision and tables to stdout."""
    from edgecl.reports.families import family_tables
    from edgecl.reports.tables import comparison_table, report_tables

    console = _console()
    for sentences, style in (([report.decision], "bold"), (report.support, "")):
        for sentence in sentences:
            console.print(_text(sentence, style), soft_wrap=not console.is_terminal)
        if sentences:
            console.print()
    for table in report_tables(report.rows):
        # Few rows have more columns than a terminal has room for: rows across, quantities down.
        _show(console, table, turned=len(table.rows) <= 5)
    for table in family_tables(report.families, report.rows):
        console.print(_text(table.title, "bold"), soft_wrap=not console.is_terminal)
        _show(console, table)
    for comparison in report.comparisons:
        _show(console, comparison_table(comparison))
    for note in report.notes:
        console.print(_text(f"note: {note}"), soft_wrap=True)


def print_diff(diff: "Diff") -> None:
    """Print what changed, one line per row and number, the conditions that differ, and the summary last."""
    console = _console()
    table = diff.table
    if table.rows:
        _show(console, table, left=(0, 1, len(table.columns) - 1))
    for line in diff.lines:
        console.print(_text(line), soft_wrap=True)
    console.print(_text(diff.summary, "bold"), soft_wrap=True)


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    # A file or a pipe has no width to fit into.
    return console if console.is_terminal else Console(highlight=False, width=400)


def _text(words: object, style: str = "") -> Any:
    from rich.text import Text

    return Text(str(words), style=style)


def _show(console: Any, content: "Table", *, left: tuple[int, ...] = (0,), turned: bool = False) -> None:
    from rich import table as rich_table

    columns, rows = content.headings, content.lines
    if turned:
        columns, *rows = [["", *columns[1:]], *rows]
        columns, *rows = [list(line) for line in zip(columns, *rows, strict=True)]
    table = rich_table.Table(box=None, pad_edge=False, header_style="dim")
    for place, column in enumerate(columns):
        table.add_column(_text(column), justify="left" if place in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    console.print(table)
    console.print()
