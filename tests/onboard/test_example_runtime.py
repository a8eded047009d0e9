"""The runtime of example/: one file in the folder of runtimes, and every verb, list and check has it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgecl
from edgecl.onboard.runtimes import RUNTIMES

from .tiny_bundle import make_bundle

EXAMPLE = Path(__file__).parent / "example" / "onnx_reference.py"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package with the example's file in it."""
    home = tmp_path_factory.mktemp("copy")
    package = Path(edgecl.__file__).parent
    shutil.copytree(package, home / "edgecl", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("recipes", "export"):
        if (package.parent / folder).is_dir():
            shutil.copytree(package.parent / folder, home / folder)
    shutil.copy(EXAMPLE, home / "edgecl" / "onboard" / "runtimes")
    return home


@pytest.fixture
def run(copy, tmp_path):
    def run(*words, code=0):
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle", runtime="onnx_reference")


def test_docs_show_the_example_as_it_is():
    shown = (REPOSITORY / "docs" / "devices.md").read_text(encoding="utf-8")
    assert f"```python\n{EXAMPLE.read_text(encoding='utf-8')}```" in shown


def test_it_verifies_and_measures_a_bundle(run, bundle):
    verified = json.loads(run("edgecl.onboard", "verify", bundle))
    assert verified["ok"] is True
    assert verified["runtime"].startswith("onnx_reference ")
    measured = json.loads(run("edgecl", "bench", bundle, "--duration-s", "0.05", "--threads", "1", "--json"))
    assert measured["measurements"][0]["latency_ms"]["p50"] > 0
    assert list(bundle.glob("bench-*-onnx-reference-fp32-1t-b1.json"))


def test_its_short_name_stands_for_it_and_ls_has_it(run, tmp_path):
    bundle = make_bundle(tmp_path / "other")
    verified = json.loads(run("edgecl", "verify", bundle, "--runtime", "reference", "--json"))
    assert verified["runtime"].startswith("onnx_reference ")
    names = [entry["name"] for entry in json.loads(run("edgecl", "ls", "runtimes", "--json"))]
    assert len(names) == len(RUNTIMES) + 1
    assert "onnx_reference (reference)" in names


def test_doctor_lists_and_diagnoses_it(run, bundle):
    checks = {one["name"]: one for one in json.loads(run("edgecl", "doctor", bundle, "--json"))["checks"]}
    assert checks["onnx_reference"]["status"] == "ok"
    checks = {one["name"]: one for one in json.loads(run("edgecl", "doctor", "--json"))["checks"]}
    assert "onnx_reference " in checks["runtimes"]["found"]


def test_a_target_for_it_is_checked_against_its_record(run, tmp_path):
    target = tmp_path / "mine.toml"
    target.write_text('runtime = "onnx_reference"\n')
    run("edgecl", "doctor", "--target", target)
    target.write_text('runtime = "onnx_reference"\nprecisions = ["fp16"]\n')
    assert "'onnx_reference' has fp32, not fp16" in run("edgecl", "doctor", "--target", target, code=1)
