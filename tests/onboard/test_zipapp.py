"""`onboard.pyz` where it is meant to run: a Python that has NumPy and onnxruntime, and nothing else."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from edgecl.deploy.onboard_zip import write_onboard

from .test_engine import python36
from .tiny_bundle import flip_byte, make_bundle


@pytest.fixture
def bundle(tmp_path):
    made = make_bundle(tmp_path / "bundle", precisions=("fp32", "fp16"))
    write_onboard(made / "onboard.pyz")
    return made


def run(python, bundle, *words, cwd=None):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, bundle / "onboard.pyz", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd or bundle.parent,
        env=environment,
    )


def check_every_verb(python, bundle):
    done = run(python, bundle, "verify")
    assert (done.returncode, done.stderr) == (0, "")
    verified = json.loads(done.stdout)
    assert verified["ok"] is True
    assert list(verified["precisions"]) == ["fp32", "fp16"]
    done = run(python, bundle, "bench", "--duration-s", "0.1", "--threads", "1")
    record = json.loads(done.stdout)
    assert done.returncode == 0
    assert record["measurements"][0]["latency_ms"]["p50"] > 0
    assert record["runtime"].startswith("onnxruntime ")
    assert "bench: " in done.stderr
    assert "Traceback" not in done.stderr
    done = run(python, bundle, "doctor")
    assert done.returncode == 0
    assert "ok    Python" in done.stderr
    checks = {check["name"]: check["status"] for check in json.loads(done.stdout)["checks"]}
    assert (checks["Python"], checks["NumPy"], checks["onnxruntime"], checks["bundle"]) == ("ok",) * 4


@pytest.mark.slow
def test_every_verb_runs_under_python_3_6(bundle):
    check_every_verb(python36(), bundle)


def test_every_verb_runs_under_this_python(bundle):
    check_every_verb(sys.executable, bundle)


def test_it_imports_nothing_of_edgecl(bundle, tmp_path):
    """Not even where edgecl lies: what is in the zip is all there is."""
    code = f"import runpy, sys; sys.argv = [{str(bundle / 'onboard.pyz')!r}, 'verify']\n"
    code += "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print([name for name in sys.modules if name.partition('.')[0] in ('edgecl', 'torch')])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert json.loads(done.stdout.splitlines()[0])["ok"] is True


def test_bundle_is_the_one_it_lies_in_wherever_one_stands(bundle, tmp_path):
    assert run(sys.executable, bundle, "verify", cwd=Path("/")).returncode == 0
    relative = subprocess.run(
        [sys.executable, "onboard.pyz", "verify"], capture_output=True, text=True, cwd=bundle, check=False
    )
    assert json.loads(relative.stdout)["ok"] is True
    flip_byte(bundle / "model.onnx")
    error = json.loads(run(sys.executable, bundle, "verify").stdout)["error"]
    assert error["problem"].startswith("'model.onnx' does not match its hash")
    other = make_bundle(tmp_path / "other")
    assert run(sys.executable, bundle, "verify", other).returncode == 0


def test_without_a_bundle_beside_it_one_must_be_named(tmp_path):
    write_onboard(tmp_path / "onboard.pyz")
    done = run(sys.executable, tmp_path, "verify")
    assert done.returncode == 2
    assert "the following arguments are required: BUNDLE" in done.stderr


def test_it_is_a_program_of_its_own(bundle):
    done = subprocess.run([bundle / "onboard.pyz", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "doctor" in done.stdout
    assert "remote" not in done.stdout


def test_missing_numpy_is_one_clear_error(bundle, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    done = run(tmp_path / "bare/bin/python", bundle, "bench")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["problem"].startswith("NumPy cannot be imported by ")
    assert error["hint"] == "sudo apt install python3-numpy"
    assert done.stderr == f"edgecl: {error['problem']}\n  hint: {error['hint']}\n"
