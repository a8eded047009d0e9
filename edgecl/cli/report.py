"""edgecl report: accuracy, latency and size side by side, on one page."""

from pathlib import Path
from typing import Annotated, Any

import typer


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
    """Write one page about nets and their runs."""
    from edgecl.artifacts import ReportDir
    from edgecl.cli.output import print_json
    from edgecl.report.report import report

    record = report(dirs, out=out, force=force)
    if json_:
        print_json(record)
        return
    print_report(record)
    typer.echo(f"report: {ReportDir(out).page_file}")


def print_report(record: dict[str, Any]) -> None:
    """Print a report's verdict and tables to stdout.

    Args:
        record: what `report` returns.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgecl.report.text import comparison_rows, table_rows

    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to fit into
        console = Console(highlight=False, width=400)

    def show(columns: list[str], rows: list[list[str]]) -> None:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for place, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if place else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        console.print()

    console.print(Text(record["verdict"], style="bold"), soft_wrap=not console.is_terminal)
    console.print()
    columns, rows = table_rows(record)
    if len(rows) > 5:
        show(columns, rows)
    elif rows:
        # Few nets have more columns than a terminal has room for: nets across, quantities down.
        show(["", *(row[0] for row in rows)], [list(line) for line in zip(columns, *rows, strict=True)][1:])
    for comparison in (record["comparison"], *record["further_comparisons"]):
        if comparison:
            show(*comparison_rows(comparison))
    for note in record["notes"]:
        console.print(Text(f"note: {note}"), soft_wrap=True)
