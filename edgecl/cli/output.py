"""What a command prints: its result on stdout, a JSON object or a table; how far it is on stderr."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any


def print_json(content: Any) -> None:
    """Print one JSON value; records in it as they stand in their files."""
    text = json.dumps(content, indent=2, allow_nan=False, default=lambda record: record.to_json())
    sys.stdout.write(text + "\n")


def print_line(text: str) -> None:
    """Print a line, whatever names of strangers are in it."""
    from edgecl.errors import printable

    sys.stdout.write(printable(text) + "\n")


def print_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; without columns' names it has no head."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgecl.errors import printable

    table = Table(title=Text(printable(title)), title_justify="left", show_header=any(columns))
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Give a function that shows how far a command is: in place on a terminal, else line by line.

    Nothing moves between two calls: an animation would take processor time from what is being measured.
    """
    from edgecl.errors import printable

    in_place = sys.stderr.isatty()

    def show(line: str) -> None:
        line = printable(line)
        sys.stderr.write(f"\r\x1b[2K{line}" if in_place else f"{line}\n")
        sys.stderr.flush()

    try:
        yield show
    finally:
        if in_place:
            show("")
