"""`python -m edgecl.onboard`, its grammar, and what it imports."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgecl.onboard
from edgecl.deploy.onboard_zip import write_onboard
from edgecl.onboard.__main__ import main

from .tiny_bundle import flip_byte, make_bundle

ONBOARD = Path(edgecl.onboard.__file__).parent
FILES = sorted(ONBOARD.rglob("*.py"))
# Each runtime in its own files.
RUNTIMES = {
    "onnxruntime.py": {"onnxruntime"},
    "openvino.py": {"openvino"},
    "tensorrt_session.py": {"tensorrt"},
    "engine.py": {"tensorrt"},
    "power.py": {"jtop"},
    "pictures.py": {"PIL"},
}
NEWER_THAN_3_6 = {"dataclasses", "contextvars", "graphlib", "zoneinfo", "tomllib", "__future__"}


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ONBOARD).as_posix() for path in FILES])
def test_file_keeps_the_grammar_of_python_3_6(path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ONBOARD).as_posix() for path in FILES])
def test_file_imports_the_standard_library_numpy_and_its_runtime_only(path):
    allowed = (set(sys.stdlib_module_names) - NEWER_THAN_3_6) | {"numpy"}
    allowed |= RUNTIMES.get(path.name, set())
    found, depth = set(), len(path.relative_to(ONBOARD).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level <= depth, f"line {node.lineno} reaches outside edgecl.onboard"
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    assert found <= allowed


def test_verify_prints_one_json_object(tmp_path, capsys):
    bundle = str(make_bundle(tmp_path / "two", precisions=("fp32", "fp16")))
    for words, precisions in (
        ([], ["fp32", "fp16"]),
        (["--precision", "fp16", "--runtime", "ort"], ["fp16"]),
    ):
        assert main(["verify", bundle, *words]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["ok"] is True
        assert list(json.loads(printed.out)["precisions"]) == precisions
        assert printed.err == ""


def test_an_error_is_json_on_stdout_and_words_on_stderr(bundle, capsys):
    flip_byte(bundle / "model.onnx")
    assert main(["bench", str(bundle)]) == 1
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert error["name"] == "bundle"
    assert error["problem"].startswith("'model.onnx' does not match its hash")
    assert printed.err == f"edgecl: {error['problem']}\n  hint: {error['hint']}\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["bench", "--duration-s", "0"], "cannot measure for 0.0 s"),
        (["bench", "--duration-s", "nan"], "cannot measure for nan s"),
        (["bench", "--threads", "0"], "cannot run on 0 threads"),
        (["bench", "--precision", "int8"], "the bundle holds no int8 net; it has fp32"),
        (
            ["bench", "--runtime", "trtexec"],
            "trtexec measures bundles for 'tensorrt', this one is for 'onnxruntime'",
        ),
        (["build"], "the bundle is for 'onnxruntime': there is no engine to build"),
    ],
)
def test_what_cannot_be_done_is_named(bundle, capsys, arguments, problem):
    assert main([*arguments, str(bundle)]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["problem"] == problem


def test_out_writes_the_record_or_the_error_whole_and_prints_nothing(bundle, tmp_path, capsys):
    record = tmp_path / "record.json"
    assert main(["verify", str(bundle), "--out", str(record)]) == 0
    assert json.loads(record.read_text())["ok"] is True
    assert capsys.readouterr().out == ""
    assert sorted(tmp_path.iterdir()) == [bundle, record]
    flip_byte(bundle / "model.onnx")
    assert main(["verify", str(bundle), "--out", str(record)]) == 1
    assert json.loads(record.read_text())["error"]["name"] == "bundle"


@pytest.mark.parametrize("verb", ["doctor", "verify", "bench"])
def test_out_that_cannot_be_written_is_told_before_anything_runs(bundle, tmp_path, capsys, verb):
    flip_byte(bundle / "model.onnx")  # would be told, were the bundle looked at
    assert main([verb, str(bundle), "--out", str(tmp_path / "nowhere/record.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"edgecl: cannot write '{tmp_path}/nowhere/record.json': there is no folder '{tmp_path}/nowhere'\n"
    )
    assert main([verb, str(bundle), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"edgecl: cannot write '{tmp_path}': it is a folder\n"


def test_doctor_takes_a_target_and_tells_its_checks_in_words_on_stderr(tmp_path, capsys):
    file = tmp_path / "target.json"
    file.write_text('{"runtime": "onnxruntime", "versions": ">=99"}')
    assert main(["doctor", "--target", str(file)]) == 1
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    checks = {check["name"]: check for check in record["checks"]}
    assert checks["onnxruntime"]["found"].endswith("; the target is for >=99")
    lines = printed.err.splitlines()
    assert lines[0].startswith(record["device"]["name"])
    words = [line.split() for line in lines[1:]]
    for check in record["checks"]:
        status = {"ok": "ok", "warn": "warn", "fail": "FAIL"}[check["status"]]
        at = words.index([status, *check["name"].split(), *check["found"].split()])
        if check["fix"]:
            assert lines[at + 2].startswith("        ")
            assert lines[at + 2].lstrip() == f"-> {check['fix']}"
    assert len(lines) == 1 + len(record["checks"]) + sum(bool(check["fix"]) for check in record["checks"])
    file.write_text("[]")
    assert main(["doctor", "--target", str(file)]) == 1
    assert "is not a target as JSON" in json.loads(capsys.readouterr().out)["error"]["problem"]


def test_doctor_with_a_target_leaves_the_bundle_it_lies_in_alone(bundle, tmp_path):
    write_onboard(bundle / "onboard.pyz")
    file = tmp_path / "target.json"
    file.write_text('{"runtime": "onnxruntime", "versions": ">=99"}')

    def names(*words):
        done = subprocess.run(
            [sys.executable, bundle / "onboard.pyz", "doctor", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        return {check["name"]: check["found"] for check in json.loads(done.stdout)["checks"]}

    assert "bundle" in names()
    found = names("--target", file)
    assert "bundle" not in found
    assert found["onnxruntime"].endswith("; the target is for >=99")


def test_remote_is_not_for_people(capsys):
    assert main(["remote", "please"]) == 2
    assert capsys.readouterr().err == "edgecl: `remote` is for `edgecl --host` only\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bench"],
        ["verify", "b", "--runtime", "trtexec"],
    ],
)
def test_wrong_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err
