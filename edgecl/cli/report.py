"""edgecl report: accuracy, latency and size side by side, on one page; and what changed since another one."""

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main


def report_command(
    dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Run, model, bundle or pipeline directories.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory to write the report to.", show_default=False)],
    json_: Annotated[bool, typer.Option("--json", help="Print report.json and nothing else.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier report.")] = False,
) -> None:
    """Write one page about nets, their bundles and their runs.

    `edgecl report diff OLD NEW` compares two reports; see `edgecl report diff --help`.
    """
    from edgecl.cli.output import print_json, print_line
    from edgecl.reports.report import report
    from edgecl.storage.directories import ReportDir

    record = report(dirs, out=out, force=force)
    if json_:
        print_json(record)
        return
    print_report(record)
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
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")] = False,
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
    record = diff(old, new, rules=rules)
    if json_:
        print_json(record)
    else:
        print_diff(record)
    if record["regression"]:
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


def print_report(record: dict[str, Any]) -> None:
    """Print a report's decision and tables to stdout.

    Args:
        record: what `report` returns.
    """
    from edgecl.reports.families import family_tables
    from edgecl.reports.text import comparison_rows, table_rows, tables_of

    console = _console()
    console.print(_text(record["decision"], style="bold"), soft_wrap=not console.is_terminal)
    console.print()
    for sentence in record["support"]:
        console.print(_text(sentence), soft_wrap=not console.is_terminal)
    if record["support"]:
        console.print()
    for table in tables_of(record):
        columns, rows = table_rows(record, table)
        if len(rows) > 5:
            _show(console, columns, rows)
        else:
            # Few rows have more columns than a terminal has room for: rows across, quantities down.
            heads = ["", *(row[0] for row in rows)]
            _show(console, heads, [list(line) for line in zip(columns, *rows, strict=True)][1:])
    for family in family_tables(record):
        console.print(_text(family.title, style="bold"), soft_wrap=not console.is_terminal)
        _show(console, family.columns, family.rows)
    for comparison in (record["comparison"], *record["further_comparisons"]):
        if comparison:
            _show(console, *comparison_rows(comparison))
    for note in record["notes"]:
        console.print(_text(f"note: {note}"), soft_wrap=True)


def print_diff(record: dict[str, Any]) -> None:
    """Print what changed, one line per row and number, the conditions that differ, and the summary last.

    Args:
        record: what `diff` returns.
    """
    from edgecl.reports.text import diff_conditions, diff_rows

    console = _console()
    columns, rows = diff_rows(record)
    if rows:
        _show(console, columns, rows, left=(0, 1, len(columns) - 1))
    for line in diff_conditions(record):
        console.print(_text(line), soft_wrap=True)
    console.print(_text(record["summary"], style="bold"), soft_wrap=True)


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    # A file or a pipe has no width to fit into.
    return console if console.is_terminal else Console(highlight=False, width=400)


def _text(words: object, style: str = "") -> Any:
    from rich.text import Text

    from edgecl.errors import printable

    return Text(printable(words), style=style)


def _show(console: Any, columns: list[str], rows: list[list[str]], left: tuple[int, ...] = (0,)) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, column in enumerate(columns):
        table.add_column(_text(column), justify="left" if place in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    console.print(table)
    console.print()
