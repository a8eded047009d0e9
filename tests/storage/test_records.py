"""The models of records: what they take and refuse, and that documents and devices agree with them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError
from sealed import header, write_sealed

from edgecl.errors import ArtifactError
from edgecl.onboard.bench import bench
from edgecl.onboard.bundle import read_manifest
from edgecl.onboard.doctor import doctor
from edgecl.onboard.errors import BundleError
from edgecl.onboard.verify import verify
from edgecl.reports.schemas import HEADER, SCHEMAS, write_schemas
from edgecl.storage.record_files import read_record, write_record
from edgecl.storage.records import (
    SCHEMA,
    BenchRecord,
    CostRecord,
    DoctorReport,
    Manifest,
    ModelRecord,
    Preprocessing,
    VerifyRecord,
    parse_record,
)

DOCS = Path(__file__).parents[2] / "docs"
PATH = Path("x.json")


def model_record(**more) -> ModelRecord:
    return ModelRecord(
        made_from="a" * 64,
        **{
            "arch": "mobilenetv3_small_100",
            "width": 0.5,
            "stem_stride": None,
            "classes": None,
            "features": 288,
            "params": 100,
            "preprocessing": Preprocessing(image_size=32, resize_size=32, mean=[0.5] * 3, std=[0.5] * 3),
            "origin": "random",
            "recipe_name": None,
            "method": None,
            "data": None,
            "weights_sha256": "b" * 64,
            **more,
        },
    )


# --- reading ---


def test_a_record_is_read_as_it_was_written(tmp_path):
    written = write_record(tmp_path / "model.json", model_record())
    assert read_record(tmp_path / "model.json", ModelRecord) == written
    assert json.loads((tmp_path / "model.json").read_text()) == written.to_json()


def test_names_that_are_no_utf8_survive(tmp_path):
    write_record(tmp_path / "model.json", model_record(data="photos/\udcff", classes=["a", "\udcfe"]))
    read = read_record(tmp_path / "model.json", ModelRecord)
    assert (read.data, read.classes) == ("photos/\udcff", ["a", "\udcfe"])


def test_entries_nobody_names_are_kept():
    content = {**model_record().to_json(), "note": [1]}
    assert parse_record(content, ModelRecord, path=PATH).to_json()["note"] == [1]


def test_a_record_begins_with_schema_kind_maker_origin_and_command():
    assert list(model_record().to_json())[:5] == list(HEADER)


@pytest.mark.parametrize("key", ["made_by", "command", "made_from", "arch", "preprocessing"])
def test_a_whole_record_lacks_nothing(key):
    content = model_record().to_json()
    del content[key]
    with pytest.raises(ArtifactError, match=key):
        parse_record(content, ModelRecord, path=PATH)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("width", float("inf")),
        ("width", "1"),
        ("width", 5),
        ("features", True),
        ("arch", 3),
        ("classes", [1]),
    ],
)
def test_a_value_of_another_type_is_named(key, value):
    with pytest.raises(ArtifactError, match=rf"x\.json.*{key}"):
        parse_record({**model_record().to_json(), key: value}, ModelRecord, path=PATH)


def test_an_error_over_a_long_key_is_short():
    content = {"schema": SCHEMA, "kind": "cost", "by_operator": {"x" * 100_000: "y"}}
    with pytest.raises(ArtifactError) as caught:
        parse_record(content, CostRecord, path=PATH)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1, 10**200])
def test_another_schema_is_refused_by_its_number(schema):
    content = {**model_record().to_json(), "schema": schema}
    with pytest.raises(ArtifactError, match=rf"schema \d+.*reads {SCHEMA}"):
        parse_record(content, ModelRecord, path=PATH)


@pytest.mark.parametrize(
    "content", [None, [], "model", {}, {"kind": ["a"]}, {"kind": "song", "schema": SCHEMA}]
)
def test_what_is_no_record_is_named(content):
    with pytest.raises(ArtifactError, match=r"x\.json"):
        parse_record(content, ModelRecord, path=PATH)


def test_a_changed_record_does_not_match_its_hash(tmp_path):
    file = tmp_path / "model.json"
    write_record(file, model_record())
    file.write_text(file.read_text().replace("0.5", "0.25", 1))
    with pytest.raises(ArtifactError, match="hash"):
        read_record(file, ModelRecord)


def test_writing_takes_only_what_can_be_read():
    with pytest.raises(ValidationError):
        model_record(width=float("nan"))


def test_secrets_do_not_reach_the_disk(tmp_path):
    written = write_record(tmp_path / "model.json", model_record(data="https://me:pass@host/x.tar?sig=1"))
    assert written.data == "https://host/x.tar"
    assert "pass" not in (tmp_path / "model.json").read_text()


# --- documents ---


def test_schemas_in_the_docs_are_those_of_the_models(tmp_path):
    write_schemas(tmp_path)
    files = {file.name: file.read_text(encoding="utf-8") for file in (DOCS / "schemas").iterdir()}
    made = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    assert files == made, "run `python -m edgecl.reports.schemas`"


def test_the_docs_name_every_schema_and_the_number():
    page = (DOCS / "records.md").read_text(encoding="utf-8")
    assert set(re.findall(r"schemas/([\w-]+)\.json", page)) == set(SCHEMAS)
    assert f"which is now {SCHEMA}" in page


# --- devices ---


def check_schema(found, name):
    """Hold what was written, by host or device, to the schema in the docs."""
    schema = json.loads((DOCS / "schemas" / f"{name}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(found)


def test_a_schema_refuses_what_its_model_does(exported_bundle):
    found = json.loads((exported_bundle / "manifest.json").read_text(encoding="utf-8"))
    check_schema(found, "bundle")
    for wrong in ({**found, "files": 3}, {key: one for key, one in found.items() if key != "precisions"}):
        with pytest.raises(jsonschema.ValidationError):
            check_schema(wrong, "bundle")


def test_what_a_device_measures_is_a_bench_record(exported_bundle):
    found = bench(exported_bundle, duration_s=0.05, power=False)
    record = parse_record({**header("bench"), **found, "command": "edgecl"}, BenchRecord, path=PATH)
    check_schema({**header("bench"), **found}, "bench")
    assert record.measurements[0].latency_ms.p50 > 0
    assert set(found) <= BenchRecord.model_fields.keys()
    assert set(found["measurements"][0]) <= type(record.measurements[0]).model_fields.keys()


def test_what_a_device_verifies_is_a_verify_record(exported_bundle):
    found = verify(exported_bundle)
    record = parse_record({**header("verify"), **found}, VerifyRecord, path=PATH)
    check_schema({**header("verify"), **found}, "verify")
    assert record.precisions["fp32"].ok
    assert set(found) <= VerifyRecord.model_fields.keys()


def test_what_a_doctor_finds_is_a_doctors_report(exported_bundle):
    found = doctor(exported_bundle)
    assert DoctorReport.model_validate(found).checks
    check_schema(found, "doctor")
    assert set(found["device"]) <= DoctorReport.model_fields["device"].annotation.model_fields.keys()


def places(content, place=()):
    """Every key of a record, at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield (*place, key)
            yield from places(value, (*place, key))


def without(content, place):
    content = copy.deepcopy(content)
    table = content
    for key in place[:-1]:
        table = table[key]
    del table[place[-1]]
    return content


def test_the_host_requires_of_a_manifest_what_the_device_requires(tmp_path, exported_bundle):
    manifest = json.loads((exported_bundle / "manifest.json").read_text(encoding="utf-8"))
    parse_record(manifest, Manifest, path=PATH)
    needed = []
    for place in places(manifest):
        changed = without(manifest, place)
        write_sealed(tmp_path / "manifest.json", changed)
        try:
            read_manifest(tmp_path)
        except BundleError:
            needed.append(place)
    assert {("input", "shape"), ("precisions", "fp32", "form"), ("files",)} <= set(needed)
    for place in needed:
        if place in (("precisions", "fp32"), ("target", "runtime")):
            continue  # one that the manifest names as its default; a target is checked as a target
        with pytest.raises(ArtifactError, match=r"x\.json"):
            parse_record(without(manifest, place), Manifest, path=PATH)
