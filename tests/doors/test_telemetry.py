"""edgecl sends nothing: real processes, in an empty home, that die when they make a socket of the internet."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from onboard.tiny_bundle import make_bundle

import edgecl
from edgecl.deploy.onboard_zip import write_onboard

# Looking a name up takes such a socket, in whatever language: the kernel kills the process, and those it started.
# Source: seccomp(2); socket(2) is system call 41 on x86-64, 198 on AArch64.
OFFLINE = """
import ctypes, os, platform, struct, sys

def step(code, value, if_true=0, if_false=0):
    return struct.pack("HBBI", code, if_true, if_false, value)

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
program = b"".join([
    step(LOAD, 0),
    step(EQUAL, {"x86_64": 41, "aarch64": 198}[platform.machine()], 0, 3),
    step(LOAD, 16),
    step(EQUAL, 2, 2, 0),  # AF_INET
    step(EQUAL, 10, 1, 0),  # AF_INET6
    step(RETURN, 0x7FFF0000),  # allow
    step(RETURN, 0x80000000),  # kill the process
])
held = ctypes.create_string_buffer(program, len(program))
filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(held)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(filters)), 0, 0):
    sys.exit(77)
os.execv(sys.argv[1], sys.argv[1:])
"""
REFUSED = 77

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="seccomp is Linux's"
)


class Offline:
    """A place with an empty home, where Python runs without the internet."""

    def __init__(self, root: Path) -> None:
        self.home, self.temporary, self.work = root / "home", root / "tmp", root / "work"
        for folder in (self.home, self.temporary, self.work):
            folder.mkdir(parents=True)

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
        for name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI", "TF_BUILD"):
            kept.pop(name, None)
        environment = {
            **kept,
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(Path(edgecl.__file__).parents[1]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", OFFLINE, sys.executable, *map(str, words)],
            capture_output=True,
            text=True,
            cwd=self.work,
            env=environment,
            check=False,
        )
        if done.returncode == REFUSED:
            pytest.skip("this machine takes no seccomp filter")
        return done

    def written(self) -> list[str]:
        """The files in the home, among temporary files and where the process stood, but for what was named."""
        places = (self.home, self.temporary, self.work)
        files = [path for place in places for path in place.rglob("*") if path.is_file()]
        return [str(path) for path in files if self.work / "named" not in path.parents]


@pytest.fixture
def offline(tmp_path):
    return Offline(tmp_path / "offline")


def assert_silent(offline, done):
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGSYS" not in done.stdout + done.stderr
    assert offline.written() == []


def test_a_process_that_looks_a_name_up_is_seen(offline):
    done = offline.run("-c", "import socket; socket.getaddrinfo('example.invalid', 443)")
    assert done.returncode == -31  # SIGSYS
    assert offline.run("-c", "import socket; socket.socket(socket.AF_UNIX)").returncode == 0


def test_a_file_that_a_process_writes_in_its_home_is_seen(offline):
    offline.run(
        "-c",
        "from pathlib import Path; (Path.home() / '.cache').mkdir(); Path.home().joinpath('.cache/id').touch()",
    )
    assert [Path(name).name for name in offline.written()] == ["id"]


@pytest.mark.parametrize(
    "words", [["verify"], ["verify", "--runtime", "openvino"], ["bench", "--duration-s", "0.2"]]
)
def test_checking_and_measuring_send_nothing(offline, words):
    if "openvino" in words:
        pytest.importorskip("openvino")
    bundle = make_bundle(offline.work / "named" / "bundle")
    assert_silent(offline, offline.run("-m", "edgecl", words[0], bundle, *words[1:]))


@pytest.mark.slow  # not minutes, but onnxruntime's first look-up comes after some seconds
def test_measuring_for_as_long_as_it_does_by_itself_sends_nothing(offline):
    bundle = make_bundle(offline.work / "named" / "bundle")
    assert_silent(offline, offline.run("-m", "edgecl", "bench", bundle))


def test_a_bundles_own_zip_sends_nothing(offline):
    bundle = make_bundle(offline.work / "named" / "bundle")
    write_onboard(bundle / "onboard.pyz")
    assert_silent(offline, offline.run(bundle / "onboard.pyz", "verify"))


def test_a_doctor_who_looks_at_every_runtime_sends_nothing(offline):
    assert_silent(offline, offline.run("-m", "edgecl", "doctor"))


def test_training_sends_nothing(offline, image_folder, recipe_file):
    words = ["pretrain", recipe_file, "--data", image_folder, "--out", offline.work / "named" / "run"]
    assert_silent(offline, offline.run("-m", "edgecl", *words, "--device", "cpu"))


def test_exporting_sends_nothing(offline, carved_model):
    model = shutil.copytree(carved_model, offline.work / "named" / "model")
    words = ["export", model, "--target", "ort-cpu", "--precision", "fp32"]
    assert_silent(offline, offline.run("-m", "edgecl", *words, "--out", offline.work / "named" / "bundle"))


@pytest.mark.parametrize(
    "module", ["edgecl", "edgecl.onboard.runtimes.onnxruntime", "edgecl.deploy.calibrate"]
)
def test_a_program_of_the_users_sends_nothing_once_it_has_imported_edgecl(offline, module):
    assert_silent(offline, offline.run("-c", f"import {module}, onnxruntime"))


def test_a_variable_that_asks_for_telemetry_is_overruled(offline, monkeypatch):
    code = "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'; import edgecl, onnxruntime"
    assert_silent(offline, offline.run("-c", code))


def test_openvino_is_as_usual_but_for_its_telemetry():
    pytest.importorskip("openvino")
    code = (
        "import sys; from edgecl.onboard.runtimes.openvino import import_openvino; openvino = import_openvino(); "
        "print(openvino.convert_model.__name__, 'openvino_telemetry' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["convert_model", "False"]
