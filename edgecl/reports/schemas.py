"""JSON Schemas of the records, written to docs/schemas by `python -m edgecl.reports.schemas`."""

from __future__ import annotations

import ast
import inspect
import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from edgecl.reports import content, diff
from edgecl.reports.precisions import Part
from edgecl.storage import records
from edgecl.storage.records import (
    KINDS,
    DoctorReport,
    MetricsLine,
    PickedImage,
    Predictions,
    ProbedNet,
    Proposal,
    PublishedCost,
    RecipeCost,
    Record,
    SelftestReport,
    Table,
)

HEADER = ("schema", "kind", "made_by", "made_from", "command")
SCHEMAS: dict[str, type[Table]] = {
    **{kind.KIND: kind for kind in KINDS},
    "report": content.Report,
    "report-diff": diff.Diff,
    "metrics": MetricsLine,
    "doctor": DoctorReport,
    "predictions": Predictions,
    "selftest": SelftestReport,
    "recipe-cost": RecipeCost,
    "published-cost": PublishedCost,
    "probed-net": ProbedNet,
    "proposal": Proposal,
    "picked-image": PickedImage,
}
"""Name of a file in docs/schemas -> what it describes."""


class _Form(GenerateJsonSchema):
    """Leaves out the titles of fields, which are their names, and what stands within a part of a report."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: Any) -> dict[str, Any]:
        if issubclass(schema["cls"], Part):
            return {"additionalProperties": True, "type": "object"}
        return super().model_schema(schema)


@cache
def _docstrings() -> dict[tuple[str, str], str]:
    # pydantic can read them too, but then each time that the records are imported, which takes a third of a second.
    return {
        (table.name, field.target.id): inspect.cleandoc(text.value.value)
        for module in (content, diff, records)
        for table in ast.parse(inspect.getsource(module)).body
        if isinstance(table, ast.ClassDef)
        for field, text in pairwise(table.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def json_schema(table: type[Table]) -> dict[str, Any]:
    """Return the JSON Schema of a record or of what a verb prints."""
    schema = table.model_json_schema(schema_generator=_Form)
    _describe(schema, table)
    for part in schema.get("$defs", {}).values():
        if "properties" in part:
            _describe(part, getattr(records, part["title"]))
    if issubclass(table, Record):
        schema["required"] = list(dict.fromkeys([*HEADER, *schema["required"]]))
    return schema


def _describe(schema: dict[str, Any], table: type[Table]) -> None:
    """Put the docstrings of a table's fields into its schema."""
    for name, field in table.model_fields.items():
        for owner in table.__mro__:
            if text := _docstrings().get((owner.__name__, name)):
                schema["properties"][field.serialization_alias or name]["description"] = text
                break


def write_schemas(folder: Path) -> None:
    """Write every schema as NAME.json."""
    for name, table in SCHEMAS.items():
        text = json.dumps(json_schema(table), indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_schemas(Path("docs/schemas"))
