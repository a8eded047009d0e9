"""`python -m edgecl.onboard`, its grammar, and what it imports."""

import ast
import json
import subprocess
import sys
import zipapp
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import edgecl.onboard
from edgecl.onboard.__main__ import main

from .tiny_bundle import flip_byte, make_bundle

ONBOARD = Path(edgecl.onboard.__file__).parent
FILES = sorted(ONBOARD.rglob("*.py"))
NEWER_THAN_3_6 = {"dataclasses", "contextvars", "graphlib", "zoneinfo", "tomllib", "__future__"}


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ONBOARD).as_posix() for path in FILES])
def test_file_keeps_the_grammar_of_python_3_6(path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ONBOARD).as_posix() for path in FILES])
def test_file_imports_the_standard_library_numpy_and_its_runtime_only(path):
    allowed = (set(sys.stdlib_module_names) - NEWER_THAN_3_6) | {"numpy"}
    if path.parent.name == "runners":
        allowed.add("onnxruntime")
    found, depth = set(), len(path.relative_to(ONBOARD).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level <= depth, f"line {node.lineno} reaches outside edgecl.onboard"
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    assert found <= allowed


def test_verify_prints_one_json_object(bundle, capsys):
    assert main(["verify", str(bundle)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["ok"] is True
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
        (["--duration-s", "0"], "cannot measure for 0.0 s"),
        (["--duration-s", "nan"], "cannot measure for nan s"),
        (["--threads", "0"], "cannot run on 0 threads"),
    ],
)
def test_values_out_of_range_are_named(bundle, capsys, arguments, problem):
    assert main(["bench", str(bundle), *arguments]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["problem"] == problem


@pytest.mark.parametrize("arguments", [[], ["paint"], ["bench"], ["bench", "b", "--threads", "x"]])
def test_wrong_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_it_runs_as_a_zip_application_without_edgecl(bundle, tmp_path):
    copytree(ONBOARD, tmp_path / "app" / "onboard", ignore=ignore_patterns("__pycache__"))
    zipapp.create_archive(tmp_path / "app", tmp_path / "onboard.pyz", main="onboard.__main__:main")
    command = [sys.executable, str(tmp_path / "onboard.pyz"), "verify", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stderr == ""
    assert json.loads(done.stdout)["ok"] is True
