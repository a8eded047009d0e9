"""Read untrusted files: regular ones only, of a bounded size, JSON of a bounded depth."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgecl.errors import ArtifactError, EdgeclError, first_line

# Far above what edgecl writes, far below what fills a machine.
RECORD_BYTES = 64 << 20
METRICS_BYTES = 1 << 30
# A manifest nests a dozen deep, and what walks through a record may not depend on how much of the stack is left.
DEEPEST = 50
# A longer number does not fit into a float.
_MOST_DIGITS = 300
# What Python and torch raise over content of another form.
_CAUSES = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError)


def read_bytes(path: Path, *, most: int | None = None, error: type[EdgeclError] = ArtifactError) -> bytes:
    """Return the content of a regular file.

    A pipe or a device, which may never end, is not opened; more than `most` bytes are not read.

    Raises:
        EdgeclError: of the given class, for no regular file, or a larger one.
        OSError: missing or unreadable; it names the file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise error(f"'{path.name}' is not a regular file", where={"file": path})
    try:
        with path.open("rb") as file:
            content = file.read() if most is None else file.read(most + 1)
    except OSError as exc:
        exc.filename = exc.filename or str(path)  # reading, unlike opening, does not say it
        raise
    if most is not None and len(content) > most:
        raise error(
            f"'{path.name}' is larger than {most >> 20} MiB, which edgecl writes none of",
            where={"file": path},
        )
    return content


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        ArtifactError: no regular file, too large, not valid JSON, or nested deeper than any record.
        OSError: missing or unreadable.
    """
    content = read_bytes(path, most=RECORD_BYTES)
    try:
        return parse_json(content)
    except ValueError as exc:
        raise ArtifactError(
            f"'{path.name}' is not valid JSON: {exc}",
            where={"file": path},
            hint="restore it from a copy, or make its directory anew in another --out",
        ) from exc


def parse_json(content: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: not JSON, nested too deep, or with a number no float can hold.
    """
    try:
        value = json.loads(content, parse_int=_whole_number)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise ValueError(f"nested more than {DEEPEST} deep")
    return value


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


@contextlib.contextmanager
def reading(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Turn an exception that a file's content causes into an error that names the file.

    Whoever writes a record can seal it, so its hash says nothing about its content. Wrap little code: other errors would be
    blamed on the file.

    Raises:
        ArtifactError: the content is not what edgecl writes.
    """
    causes: tuple[type[Exception], ...] = (*_CAUSES, *more)
    try:
        yield
    except causes as exc:
        raise ArtifactError(
            f"'{path.name}' is not what edgecl writes ({type(exc).__name__}: {first_line(exc)})",
            where={"file": path},
            hint="make its directory anew; `edgecl --debug` before the command shows what failed",
        ) from exc
