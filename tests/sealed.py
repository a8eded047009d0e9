"""Records as dictionaries, sealed: what a test writes in place of what edgecl wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgecl.onboard.bundle import digest_of_record
from edgecl.storage.records import MADE_BY, SCHEMA
from edgecl.storage.writing import write_json


def header(kind: str) -> dict[str, Any]:
    """Return what every record begins with."""
    return {"schema": SCHEMA, "kind": kind, "made_by": MADE_BY, "made_from": None, "command": "edgecl"}


def write_sealed(path: Path, record: dict[str, Any]) -> None:
    """Write a record with the hash of its own content."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    write_json(path, {**content, "sha256": digest_of_record(content)})
