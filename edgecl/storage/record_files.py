"""Read and write records: the kind of a directory, its record as the model of that kind, checked against its own hash."""

from __future__ import annotations

from pathlib import Path

from edgecl.errors import ArtifactError
from edgecl.onboard.bundle import digest_of_record
from edgecl.storage.reading import read_json
from edgecl.storage.records import (
    Manifest,
    ModelRecord,
    PipelineRecord,
    PublishedRecord,
    RecordT,
    RunRecord,
    SealedRecord,
    parse_record,
)
from edgecl.storage.redaction import record_without_secrets
from edgecl.storage.writing import write_json

RECORD_FILES = {
    **{kind.KIND: kind.FILE for kind in (RunRecord, ModelRecord, Manifest, PipelineRecord, PublishedRecord)},
    "report": "report.json",
}
"""Kind of directory -> the file of its record."""
_HOW_TO_MAKE = {
    RunRecord.KIND: "`edgecl pretrain` writes run directories",
    ModelRecord.KIND: "`edgecl carve` and `edgecl finetune` write model directories; for a file of weights, first "
    "`edgecl init PHOTOS --weights FILE --arch NAME --out RECIPE.toml`, then `edgecl carve RECIPE.toml`",
    Manifest.KIND: "`edgecl export` writes bundles",
}


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


def read_record(path: Path, kind: type[RecordT]) -> RecordT:
    """Read a record and check its kind, schema, types, and hash if it is a sealed one.

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
    record = parse_record(content, kind, path=path)
    if isinstance(record, SealedRecord) and record.sha256 != digest_of_record(content):
        raise ArtifactError(
            f"'{path.name}' does not match the hash of its own content",
            where={"file": path},
            hint="the file changed after it was written; make its directory anew",
        )
    return record


def write_record(path: Path, record: RecordT) -> RecordT:
    """Write a record without secrets, a sealed one with the hash of its content, and return it as written.

    Raises:
        ArtifactError: the disk is full; nothing is left behind.
    """
    content = record_without_secrets(record.to_json())
    if isinstance(record, SealedRecord):
        content["sha256"] = digest_of_record(content)
    write_json(path, content)
    return record.model_validate(content)
