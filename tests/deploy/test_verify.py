"""The host's `verify`: the device code's decision, kept beside the bundle."""

import json
import subprocess
import sys

import pytest
import typer
from onboard.tiny_bundle import flip_byte, make_bundle
from typer.testing import CliRunner

from edgecl.cli.verify import verify_command
from edgecl.deploy.device import verify
from edgecl.errors import ArtifactError, DeviceError, ParityError
from edgecl.onboard.bundle import sha256_of_file


def kept(bundle):
    return json.loads((bundle / "verify.json").read_text())


def test_decision_is_returned_and_kept(bundle):
    record = verify(bundle).to_json()
    assert record == kept(bundle)
    assert list(record)[:4] == ["schema", "kind", "made_by", "made_from"]
    assert record["kind"] == "verify"
    assert record["made_from"] == sha256_of_file(bundle / "manifest.json")
    assert record["ok"] is True


def test_flipped_byte_is_an_artifact_error_and_ends_an_earlier_decision(bundle):
    verify(bundle)
    flip_byte(bundle / "model.onnx")
    with pytest.raises(ArtifactError, match=r"'model.onnx' does not match its hash") as caught:
        verify(bundle)
    assert caught.value.where == {"bundle": bundle}
    assert kept(bundle)["ok"] is False
    assert kept(bundle)["files_ok"] is False
    assert kept(bundle)["problem"] == caught.value.problem


def test_wrong_outputs_are_a_parity_error_with_numbers(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", shift=100.0)
    with pytest.raises(ParityError, match=r"fp32: the largest relative difference is .*, allowed is 0.001"):
        verify(bundle)
    assert kept(bundle)["ok"] is False
    assert kept(bundle)["files_ok"] is True
    assert kept(bundle)["precisions"]["fp32"]["max_abs_difference"] == pytest.approx(100.0, rel=1e-5)


def test_one_precision_of_several_can_be_asked(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", precisions=("fp16", "fp32"))
    assert list(verify(bundle).precisions) == ["fp16", "fp32"]
    assert list(verify(bundle, precisions=["fp32"], runtime="ort").precisions) == ["fp32"]
    with pytest.raises(ArtifactError, match="the bundle holds no int8 net; it has fp16, fp32"):
        verify(bundle, precisions=["int8"])


def test_missing_runtime_is_a_device_error_and_no_decision(bundle, monkeypatch):
    code = "import sys; sys.modules['onnxruntime'] = None; "
    code += "from edgecl.onboard.__main__ import main; sys.exit(main())"
    monkeypatch.setattr("edgecl.deploy.process._ONBOARD", [sys.executable, "-c", code])
    with pytest.raises(DeviceError, match="hint:   pip install onnxruntime"):
        verify(bundle)
    assert not (bundle / "verify.json").exists()


def test_a_result_that_cannot_be_kept_is_no_failure(bundle, monkeypatch):
    def refuse(path, content):
        raise ArtifactError(f"no permission to write '{path.name}'")

    monkeypatch.setattr("edgecl.deploy.device.write_record", refuse)
    lines = []
    assert verify(bundle, report=lines.append).ok is True
    assert lines == ["the result is not kept: no permission to write 'verify.json'"]
    done = run_command(bundle)
    assert done.exit_code == 0
    assert "largest relative difference" in done.stdout


def test_verify_never_imports_torch(bundle):
    code = "import sys; from pathlib import Path; from edgecl.deploy.device import verify; "
    code += "verify(Path(sys.argv[1])); import edgecl.deploy.device; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def run_command(*arguments):
    app = typer.Typer()
    app.command()(verify_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_prints_one_json_object(bundle):
    done = run_command(bundle, "--json")
    assert json.loads(done.stdout) == kept(bundle)


def test_command_prints_a_table_with_what_is_allowed(bundle):
    done = run_command(bundle)
    assert "largest relative difference" in done.stdout
    assert "<= 0.001" in done.stdout
    assert ">= 0.99" in done.stdout
