"""Records as dictionaries: goes when deploy and reports read and write the models of `records`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgecl.errors import ArtifactError, bounded, first_of
from edgecl.onboard import bundle as bundle_names
from edgecl.storage.directories import Bundle, ModelDir
from edgecl.storage.reading import read_json
from edgecl.storage.records import MADE_BY, SCHEMA, _check_schema, command_line
from edgecl.storage.redaction import record_without_secrets
from edgecl.storage.writing import write_json


class _Table(BaseModel):
    """A part of a record; what is not named here may be anything."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


class _Header(_Table):
    made_by: str | None = None
    made_from: str | None = None
    command: str | None = None
    sha256: str | None = None
    recipe_name: str | None = None
    arm: str | None = None


_PerChannel = Annotated[list[float], Field(min_length=3, max_length=3)]


class _Preprocessing(_Table):
    image_size: int = Field(ge=1, le=4096)
    resize_size: int = Field(ge=1, le=8192)
    mean: _PerChannel
    std: _PerChannel


class _Quantization(_Table):
    keep: list[str]


class _Model(_Header):
    arch: str
    width: float = Field(gt=0, le=4)
    stem_stride: Literal[1, 2] | None
    classes: list[str] | None
    features: int
    params: int
    preprocessing: _Preprocessing
    origin: str
    recipe_name: str | None
    arm: str | None
    epoch: int | None = None
    step: int | None = None
    quantization: _Quantization | None = None
    data: str | None
    weights_sha256: str


class _Images(_Table):
    uri: str
    fingerprint: str | None = None
    skipped: list[str] = []


class _Run(_Header):
    recipe: dict[str, Any]
    recipe_name: str | None
    data: _Images
    state: str = "done"


class _Stage(_Table):
    made: list[str] = []


class _Pipeline(_Header):
    recipe: dict[str, Any]
    stages: dict[str, _Stage]


class _Net(_Table):
    model_sha256: str | None = None


class _Bundle(_Header):
    net: _Net | None = None


class _Evaluation(_Header):
    test_uri: str | None = None


class _Bench(_Header):
    batch: int | None = None
    threads: int | None = None
    runtime: str | None = None


_KINDS: dict[str, type[_Header]] = {
    "model": _Model,
    "run": _Run,
    "pipeline": _Pipeline,
    "bundle": _Bundle,
    "evaluation": _Evaluation,
    "bench": _Bench,
}


def check_record(record: dict[str, Any], *, path: Path, whole: bool) -> None:
    """Hold a record to the types that the host relies on.

    Args:
        record: what was read; its kind says what should be in it.
        path: the file, for the error.
        whole: whether a missing entry is an error; a report leaves it out.

    Raises:
        ArtifactError: an entry is of another type or range, or missing.
    """
    kind = record.get("kind")
    model = _KINDS.get(kind if isinstance(kind, str) else "", _Header)
    # Names of files need not be UTF-8, and are in commands; pydantic takes no such text.
    text = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")
    try:
        model.model_validate_json(text)
    except ValidationError as exc:
        problems = [
            f"'{bounded('.'.join(map(str, problem['loc'])), 100)}': {problem['msg'].lower()}"
            for problem in exc.errors(include_url=False, include_input=False, include_context=False)
            if whole or problem["type"] != "missing"
        ]
        if problems:
            raise ArtifactError(
                f"'{path.name}' is not what edgecl writes: {first_of(problems)}",
                where={"file": path},
                hint="restore it from a copy, or make its directory anew",
            ) from None


def record_header(kind: str, *, made_from: str | None) -> dict[str, Any]:
    """Return the first keys of every record, with the command that makes it."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "made_by": MADE_BY,
        "made_from": made_from,
        "command": command_line(),
    }


def read_record(path: Path, *, kind: str) -> dict[str, Any]:
    """Read a JSON record and check its kind and schema, and the types that the host relies on."""
    record = read_side_record(path)
    if record.get("kind") != kind:
        raise ArtifactError(f"'{path.name}' is not the record of a {kind}", where={"file": path})
    return record


def read_side_record(path: Path) -> dict[str, Any]:
    """Read a JSON record that lies beside another one, of whatever kind.

    Raises:
        ArtifactError: no regular file, not JSON, no record, of a newer schema, or with an entry of another type.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise ArtifactError(f"'{path.name}' is not a record", where={"file": path})
    _check_schema(record, path)
    check_record(record, path=path, whole=False)
    return record


def check_seal(record: dict[str, Any], where: dict[str, object], *, hint: str) -> None:
    """Hold a record that `write_sealed` wrote to its own hash.

    Raises:
        ArtifactError: it changed since.
    """
    if record.get("sha256") != bundle_names.digest_of_record(record):
        name = {ModelDir.KIND: ModelDir.RECORD, Bundle.KIND: Bundle.RECORD}[record["kind"]]
        raise ArtifactError(f"'{name}' does not match the hash of its own content", where=where, hint=hint)


def write_sealed(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write a record with the hash of its own content, and return it so."""
    record = record_without_secrets(record)
    sealed = {**record, "sha256": bundle_names.digest_of_record(record)}
    write_json(path, sealed)
    return sealed
