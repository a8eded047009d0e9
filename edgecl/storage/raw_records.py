"""Light checks of records that reports still read as dictionaries; goes when they read typed ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgecl.errors import ArtifactError, bounded, first_of


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
