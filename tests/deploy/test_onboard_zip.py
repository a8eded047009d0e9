"""`onboard.pyz` as a file: what is in it, and the same bytes each time."""

import io
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import edgecl.onboard
from edgecl.deploy.onboard_zip import onboard_bytes, write_onboard

ONBOARD = Path(edgecl.onboard.__file__).parent


def test_it_holds_the_device_code_and_nothing_else():
    with zipfile.ZipFile(io.BytesIO(onboard_bytes())) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        sources = {name: archive.read(name) for name in names}
    there = {f"onboard/{path.relative_to(ONBOARD).as_posix()}": path for path in ONBOARD.rglob("*.py")}
    assert sources.keys() == {"__main__.py", *there}
    assert all(sources[name] == path.read_bytes() for name, path in there.items())
    assert names == sorted(names)


def test_same_sources_give_the_same_bytes_at_another_time_and_place(tmp_path):
    """Another process, in which the package is a copy with new time stamps, in another order on the disk."""
    first = onboard_bytes()
    copy = tmp_path / "elsewhere/edgecl"
    copy.mkdir(parents=True)
    for path in sorted(ONBOARD.parent.rglob("*.py"), reverse=True):
        place = copy / path.relative_to(ONBOARD.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    time.sleep(0.01)
    code = "import sys; from pathlib import Path; from edgecl.deploy.onboard_zip import write_onboard; "
    code += "import edgecl; assert 'elsewhere' in edgecl.__file__; write_onboard(Path(sys.argv[1]))"
    environment = {"PYTHONPATH": str(copy.parent), "TZ": "Asia/Tokyo", "PATH": "/usr/bin:/bin"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "o.pyz")], check=True, env=environment, cwd=tmp_path
    )
    assert (tmp_path / "o.pyz").read_bytes() == first


def test_file_is_executable_compressed_and_begins_with_its_interpreter(tmp_path):
    write_onboard(tmp_path / "onboard.pyz")
    path = tmp_path / "onboard.pyz"
    assert path.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert path.stat().st_mode & 0o777 == 0o755
    with zipfile.ZipFile(path) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_DEFLATED}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_stub_keeps_a_grammar_that_any_python_reads_and_tells_an_old_one(monkeypatch, capsys):
    """The stub is run as Python 3.5 would: with its version."""
    with zipfile.ZipFile(io.BytesIO(onboard_bytes())) as archive:
        stub = archive.read("__main__.py").decode()
    monkeypatch.setattr(sys, "version_info", (3, 5, 2, "final", 0))
    with pytest.raises(SystemExit) as caught:
        exec(compile(stub, "__main__.py", "exec"), {})
    assert caught.value.code == 1
    said = capsys.readouterr()
    assert "edgecl: Python 3.5 is too old for onboard.pyz, which needs 3.6" in said.err
    assert '"name": "device"' in said.out
