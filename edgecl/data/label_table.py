"""Pictures named by a CSV file, with a class each or a set of classes each."""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path

import numpy as np

from edgecl.data.source import ImageSource, expanded, read_plain_file
from edgecl.errors import DataError, counted
from edgecl.storage.reading import read_bytes

SCHEME = "csv"
SUMMARIES = {
    "csv:FILE": "pictures in a table: columns `file` and `label`, or `labels` with any number of classes, parted by ;"
}
BETWEEN = ";"
_MOST_BYTES = 1 << 30


def open_table(uri: str) -> ImageSource:
    """Open the pictures that csv:FILE names; paths are relative to its folder.

    Its header has `file`, and `label` for one class of each picture or `labels` for a set: classes parted by a semicolon,
    nothing for none. Other columns are left alone.

    Raises:
        DataError: no such file, no such columns, no rows, a picture named twice, or no class at all.
    """
    file = expanded(uri.partition(":")[2])
    if not file.is_file():
        raise DataError(f"there is no table '{file}'")
    content = read_bytes(file, most=_MOST_BYTES)
    column, rows = _rows(file, content)
    names = [name for name, _ in rows]
    several = [tuple(filter(None, map(str.strip, text.split(BETWEEN)))) for _, text in rows]
    if column == "label":
        several = [(text.strip(),) for _, text in rows]
        for name, (label,) in zip(names, several, strict=True):
            if not label:
                raise DataError(f"'{name}' has no class in the column 'label'", where={"table": file})
    classes = sorted({label for labels in several for label in labels})
    if not classes:
        raise DataError("no picture has a class", where={"table": file})
    places = {label: place for place, label in enumerate(classes)}
    label_sets = np.zeros((len(rows), len(classes)), dtype=np.bool_)
    for row, labels in enumerate(several):
        label_sets[row, [places[label] for label in labels]] = True
    root = file.parent
    return ImageSource(
        uri=uri,
        fingerprint=hashlib.sha256(content).hexdigest(),
        length=len(rows),
        opener=None,
        reader=lambda index: read_plain_file(f"{root}/{names[index]}"),
        namer=lambda index: str(root / names[index]),
        classes=tuple(classes),
        labels=label_sets.argmax(1) if column == "label" else None,
        label_sets=None if column == "label" else label_sets,
    )


def _rows(file: Path, content: bytes) -> tuple[str, list[tuple[str, str]]]:
    """Return the column of labels, and name and labels of each picture."""
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig")), strict=True)
        columns = reader.fieldnames or []
        column = next((name for name in ("labels", "label") if name in columns), None)
        if "file" not in columns or column is None:
            raise DataError(
                f"the table has the columns {', '.join(columns) or 'none'}; it needs 'file', and 'label' or 'labels'",
                where={"table": file},
            )
        rows = [(row["file"] or "", row[column] or "") for row in reader]
    except (csv.Error, UnicodeDecodeError) as exc:
        raise DataError(f"not a CSV file in UTF-8: {exc}", where={"table": file}) from exc
    if not rows:
        raise DataError("the table names no picture", where={"table": file})
    names = {name for name, _ in rows}
    if "" in names or len(names) < len(rows):
        what = "a row without a file" if "" in names else counted(len(rows) - len(names), "file") + " twice"
        raise DataError(f"the table has {what}", where={"table": file})
    return column, rows
