"""The few pieces of markup that several sections of the page share."""

from __future__ import annotations

import html
from collections.abc import Sequence

from edgecl.errors import printable
from edgecl.reports.notation import MISSING


def escaped(text: object) -> str:
    """Write text so that a browser shows it as it is, inside an element or an attribute."""
    return html.escape(printable(text), quote=True)


def captioned(svg: str, caption: str) -> str:
    """Set a drawing over its caption."""
    return f"<figure>{svg}<figcaption>{escaped(caption)}</figcaption></figure>\n"


def detail_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table of strings, with its columns' headings repeated in each cell for narrow screens."""
    head = "".join(f'<th scope="col">{escaped(column)}</th>' for column in columns)
    body = []
    for row in rows:
        cells = "".join(
            f'<td data-label="{escaped(column)}"{" class=missing" if value == MISSING else ""}>'
            f"<span>{escaped(value)}</span></td>"
            for column, value in zip(columns[1:], row[1:], strict=True)
        )
        body.append(f'<tr><th scope="row">{escaped(row[0])}</th>{cells}</tr>')
    return (
        f'<table class="rows detail">\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody>\n</table>\n"
    )
