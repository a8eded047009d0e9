"""The host's `doctor`: this machine, a bundle, a target, and what the command prints."""

import typer
from typer.testing import CliRunner

import edgecl.deploy.device
from edgecl.cli.doctor import doctor_command
from edgecl.deploy.device import doctor
from edgecl.storage.records import DoctorReport


def by_name(found):
    return {check.name: check for check in found.checks}


def test_this_machine_as_such_is_told_its_runtimes_and_ssh(monkeypatch, tmp_path):
    found = doctor()
    assert "onnxruntime " in by_name(found)["runtimes"].found
    assert by_name(found)["ssh"].status in ("ok", "warn")
    monkeypatch.setenv("PATH", str(tmp_path))
    ssh = by_name(doctor())["ssh"]
    assert (ssh.status, ssh.fix) == ("warn", "sudo apt install openssh-client  # for --host")


def test_packaged_target_is_followed_to_its_device_and_versions():
    found = doctor(target="jetson")
    assert found.ok is False
    assert by_name(found)["device"].found == "this is no Jetson; the target is for any Jetson Orin"
    assert doctor(target="ort-cpu").ok is True


def run_command(*words):
    app = typer.Typer()
    app.command()(doctor_command)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_command_prints_a_line_per_check_and_what_to_do_below(monkeypatch):
    record = {
        "ok": False,
        "device": {"name": "Jetson Nano", "os": "Ubuntu 18.04", "jetpack": "4.6.1"},
        "checks": [
            {"name": "Python", "status": "ok", "found": "3.6.9", "fix": None},
            {"name": "swap", "status": "warn", "found": "900 of 1900 MiB in use", "fix": "reboot"},
            {"name": "NumPy", "status": "fail", "found": "missing", "fix": "sudo apt install python3-numpy"},
        ],
    }
    monkeypatch.setattr(
        edgecl.deploy.device, "doctor", lambda bundle, **settings: DoctorReport.model_validate(record)
    )
    done = run_command()
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "Jetson Nano, Ubuntu 18.04, JetPack 4.6.1",
        "ok    Python  3.6.9",
        "warn  swap    900 of 1900 MiB in use",
        "              -> reboot",
        "FAIL  NumPy   missing",
        "              -> sudo apt install python3-numpy",
    ]
    record["ok"] = True
    assert run_command().exit_code == 0


def test_bundle_and_target_together_are_wrong_usage(tmp_path):
    assert run_command(tmp_path, "--target", "jetson").exit_code == 2
