"""Records that were changed and sealed anew are named as no records of edgecl, whatever stands in them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from reports.conftest import Maker, report
from sealed import write_sealed

from edgecl.errors import ArtifactError, EdgeclError
from edgecl.evaluate.cost import cost
from edgecl.nets.model_dir import load_model
from edgecl.onboard.bundle import digest_of_record
from edgecl.reports.content import Report
from edgecl.storage.directories import ModelDir
from edgecl.storage.reading import DEEPEST, parse_json, read_bytes, reading
from edgecl.storage.record_files import kind_of, read_record
from edgecl.storage.records import KINDS
from edgecl.train.carve import carve

ODD = [None, True, -1, 10**200, "9", 1e308, [], ["a", 1], {}, {"a": []}, "\x1b", [[["x"]]]]


def reseal(directory, **changes):
    """Change a model's record, and write it with the hash of its new content."""
    record = json.loads((directory / "model.json").read_text(encoding="utf-8"))
    for key, value in changes.items():
        where = record
        *parents, leaf = key.split("__")
        for parent in parents:
            where = where[parent]
        if value is ...:
            del where[leaf]
        else:
            where[leaf] = value
    write_sealed(directory / "model.json", record)


@pytest.fixture
def model(tmp_path, carved_model):
    return shutil.copytree(carved_model, tmp_path / "model")


KEYS = [
    "arch",
    "width",
    "classes",
    "quantization",
    "preprocessing__image_size",
    "preprocessing__mean",
    "made_from",
]


@pytest.mark.parametrize("key", KEYS)
def test_a_model_record_with_another_value_is_refused_or_read_as_it_is(tmp_path, carved_model, key):
    """Missing or of another type: a named error before any net is built, or what the value allows."""
    refused = 0
    values = [*ODD, *([] if key in ("quantization", "made_from") else [...])]
    for number, value in enumerate(values):
        directory = shutil.copytree(carved_model, tmp_path / str(number))
        reseal(directory, **{key: value})
        try:
            load_model(directory)
        except EdgeclError:
            refused += 1
    assert refused >= len(values) - 4


def test_a_quantization_without_its_modules_is_named(model):
    reseal(model, quantization={"precision": "int8"})
    with pytest.raises(ArtifactError, match=r"model\.json.*quantization\.keep"):
        load_model(model)


def header(length, content):
    return length.to_bytes(8, "little") + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        header(2**63 - 1, b"{}"),
        header(2, b"{}") + b"x" * 100,
        header(20, b"\xff" * 20),
        header(77, b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","x":1}}'),
        header(58, b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,4]}}'),
    ],
    ids=["empty", "endless header", "no tensors", "no JSON", "no shape", "wrong size"],
)
def test_weights_that_are_no_safetensors_are_named(model, content):
    (model / "weights.safetensors").write_bytes(content)
    reseal(model, weights_sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(ArtifactError, match="weights"):
        load_model(model)


def test_a_net_that_does_not_take_its_own_pictures_is_named(model):
    reseal(model, preprocessing__image_size=100_000)
    with pytest.raises(ArtifactError, match="image_size"):
        cost(model)


@pytest.fixture
def run(tmp_path, trained_run):
    return shutil.copytree(trained_run, tmp_path / "run")


def change_run(run, change):
    file = run / "run.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    change(record)
    file.write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("data"),
        lambda record: record.update(data=[]),
        lambda record: record.update(data={"uri": ["a"]}),
        lambda record: record.update(recipe="text"),
        lambda record: record.update(recipe_name={"a": 1}),
        lambda record: record["recipe"].update(projector={"sizes": [8, 8]}),
        lambda record: record["recipe"].update(projector={"sizes": [10**9]}),
        lambda record: record["recipe"]["host"].update(arch="hf_hub:someone/something"),
    ],
    ids=range(8),
)
def test_a_run_record_that_does_not_fit_leaves_no_model(tmp_path, run, change):
    change_run(run, change)
    with pytest.raises(EdgeclError):
        carve(run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["nine", float("nan"), None, [1], 10**200])
def test_a_checkpoint_with_another_step_is_passed_over(tmp_path, run, step, capsys):
    for file in run.glob("checkpoints/*/state.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        del record["sha256"]
        record["step"] = step
        file.write_text(json.dumps({**record, "sha256": digest_of_record(record)}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"whole|torn"):
        carve(run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- files that are no files ---


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "large"])
@pytest.mark.parametrize("name", ["model.json", "run.json", "manifest.json", "pipeline.json", "report.json"])
def test_a_record_that_is_no_regular_file_is_named_and_not_opened(tmp_path, name, kind, monkeypatch):
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    (record,) = (record for record in (*KINDS, Report) if name == record.FILE)
    with pytest.raises(ArtifactError, match=r"regular file|larger than"):
        read_record(path, record)
    assert kind_of(tmp_path) is None


def test_a_checkpoint_of_pipes_is_passed_over(tmp_path, run):
    for file in run.glob("checkpoints/*/*"):
        file.unlink()
        os.mkfifo(file)
    with pytest.raises(ArtifactError, match=r"whole|torn"):
        carve(run, out=tmp_path / "out")


def test_metrics_of_a_pipe_are_named(tmp_path):
    run = Maker().run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl"):
        report([run], out=tmp_path / "r")


# --- JSON ---


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 800 + b"1" + b"}" * 800,
        b"[" * (DEEPEST + 1) + b"1" + b"]" * (DEEPEST + 1),
        b"9" * 5000,
        b"9" * 400,
        b"\xff\xfe\x00",
        b"",
    ],
)
def test_json_that_would_fell_a_reader_is_a_value_error(text):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_json(text)
    assert len(str(caught.value)) < 500


def test_json_that_is_as_deep_as_allowed_is_read():
    assert parse_json(b"[" * DEEPEST + b"1" + b"]" * DEEPEST)


def test_lines_of_metrics_that_are_too_deep_are_counted_as_unreadable(tmp_path):
    run = Maker().run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"[" * 100_000 + b"\n" + b'{"step": ' + b"9" * 5000 + b"}\n")
    assert any("2 lines of metrics.jsonl" in note for note in report([run], out=tmp_path / "r")["notes"])


def test_an_epoch_of_twenty_digits_is_drawn(tmp_path):
    run = Maker().run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9999, "epoch": 100000000000000000000, "loss": 1.0}\n')
    assert report([run], out=tmp_path / "r")["runs"][0]["epochs"] == 1e20


def test_a_panel_with_a_name_longer_than_a_chart_is_drawn(tmp_path):
    lines = {"loss": "total", "sacl": "x" * 500}
    run = Maker().run(tmp_path / "run", panels=[{"title": "t", "lines": lines, "unit": "", "log": True}])
    assert report([run], out=tmp_path / "r")["runs"][0]["panels"][0]["lines"]["sacl"] == "x" * 24


def test_a_command_with_a_file_name_that_is_no_utf8_is_no_fault_of_the_record(model):
    reseal(model, command="edgecl carve runs/\udcff --out m")
    assert ModelDir(model).read().command.endswith("--out m")


# --- the handler ---


def test_the_handler_names_the_file_and_keeps_the_cause(tmp_path):
    with (
        pytest.raises(ArtifactError, match=r"x\.json.*not what edgecl writes.*KeyError") as caught,
        reading(Path("x.json")),
    ):
        {}["arch"]
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_handler_lets_named_errors_and_the_systems_through():
    with pytest.raises(ArtifactError, match=r"^mine$"), reading(Path("x.json")):
        raise ArtifactError("mine")
    with pytest.raises(FileNotFoundError), reading(Path("x.json")):
        raise FileNotFoundError


def test_a_file_of_the_largest_size_is_read_whole(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 100)
    assert read_bytes(tmp_path / "f", most=100) == b"x" * 100
    with pytest.raises(ArtifactError, match="larger"):
        read_bytes(tmp_path / "f", most=99)
