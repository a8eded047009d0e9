"""Read untrusted files: regular ones only, of a bounded size, JSON of a bounded depth, records of the expected types."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgecl.errors import ArtifactError, EdgeclError, first_line
from edgecl.onboard.bundle import digest_of_record
from edgecl.storage.records import (
    Manifest,
    ModelRecord,
    PipelineRecord,
    Record,
    RecordT,
    ReportRecord,
    RunRecord,
    SealedRecord,
    parse_any_record,
    parse_record,
)

# Far above what edgecl writes, far below what fills a machine.
RECORD_BYTES = 64 << 20
METRICS_BYTES = 1 << 30
# A manifest nests a dozen deep, and what walks through a record may not depend on how much of the stack is left.
DEEPEST = 50
# A longer number does not fit into a float.
_MOST_DIGITS = 300
RECORD_FILES = {
    kind.KIND: kind.FILE for kind in (RunRecord, ModelRecord, Manifest, ReportRecord, PipelineRecord)
}
"""Kind of directory -> the file of its record."""
_HOW_TO_MAKE = {
    RunRecord.KIND: "`edgecl pretrain` writes run directories",
    ModelRecord.KIND: "`edgecl carve` and `edgecl finetune` write model directories",
    Manifest.KIND: "`edgecl export` writes bundles",
}
# What Python and torch raise over content of another form.
_CAUSES = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError)


def read_bytes(path: Path, *, most: int | None = None, error: type[EdgeclError] = ArtifactError) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file; a pipe or a device, which may never end, is not opened.
        most: how many bytes it may have; None allows any number.
        error: which class to raise.

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


def kind_of(path: Path) -> str | None:
    """Return which kind of edgecl output a directory is, or None.

    The record itself must say so: a user's own folder may well hold a model.json or a manifest.json.
    """
    for kind, name in RECORD_FILES.items():
        try:
            record = read_json(path / name)
        except (FileNotFoundError, NotADirectoryError, ArtifactError):
            continue
        if isinstance(record, dict) and record.get("kind") == kind and "schema" in record:
            return kind
    return None


def read_record(path: Path, kind: type[RecordT], *, missing_ok: bool = False) -> RecordT:
    """Read a record and check its kind, schema, types, and hash if it is a sealed one.

    Args:
        path: the file.
        kind: what it should be the record of.
        missing_ok: whether entries may be missing, as in a record that is only reported on; see `parse_record`.

    Raises:
        ArtifactError: missing, no regular file, not JSON, of another kind or schema, changed since it was written, or an
            entry is missing or of another type.
    """
    if not path.exists():
        found = kind_of(path.parent) if path.parent.is_dir() else None
        problem = f"'{path.parent}' is not a {kind.KIND} directory"
        problem += f" but a {found} directory" if found else f": it has no {path.name}"
        raise ArtifactError(problem, hint=_HOW_TO_MAKE.get(kind.KIND))
    content = read_json(path)
    record = parse_record(content, kind, path=path, missing_ok=missing_ok)
    if isinstance(record, SealedRecord):
        _check_seal(content, record, path, missing_ok=missing_ok)
    return record


def read_any_record(path: Path) -> Record:
    """Read a record of whatever kind it says it is; entries may be missing.

    Raises:
        ArtifactError: no record, or as of `read_record`.
    """
    return parse_any_record(read_json(path), path=path)


def _check_seal(content: dict[str, Any], record: SealedRecord, path: Path, *, missing_ok: bool) -> None:
    if record.sha256 is None and missing_ok:
        return
    if record.sha256 != digest_of_record(content):
        raise ArtifactError(
            f"'{path.name}' does not match the hash of its own content",
            where={"file": path},
            hint="the file changed after it was written; make its directory anew",
        )


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

    Args:
        path: the file.
        more: further exceptions that the content can cause.

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
