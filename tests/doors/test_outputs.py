"""No output replaces its own input, and a process killed at any moment leaves nothing that stays for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from edgecl.storage.lock import hold
from edgecl.storage.outputs import new_directory
from edgecl.storage.writing import remove_leftovers, write_bytes


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ways_to(folder, tmp_path):
    """A directory itself under several names, one inside it, and one that holds it."""
    link = tmp_path / "link"
    link.symlink_to(folder)
    return [folder, link, folder / "." / ".." / folder.name, folder / "inside", folder.parent]


@pytest.mark.parametrize(
    ("verb", "made_from", "options"),
    [
        ("finetune", "carved_model", ["--data", "demo"]),
        ("carve", "trained_run", []),
        ("export", "carved_model", ["--target", "ort-cpu"]),
    ],
)
def test_no_verb_replaces_or_changes_its_own_input(tmp_path, request, edgecl, verb, made_from, options):
    folder = request.getfixturevalue(made_from)
    before = contents(folder)
    for out in ways_to(folder, tmp_path):
        code, _, said = edgecl(verb, folder, "--out", out, "--force", *options)
        assert code == 1
        assert "that it is made from" in said
    assert contents(folder) == before


WRITER = """
import os, signal, sys
from pathlib import Path
from edgecl.storage.outputs import new_directory
from edgecl.storage.writing import write_bytes
out = Path(sys.argv[1])
(out / "bundles").mkdir(exist_ok=True)
with new_directory(out / "bundles" / "ort-cpu", kind="bundle", force=True) as aside:
    (aside / "model.onnx").write_bytes(b"half")
    write_bytes(aside / "manifest.json", b"{}")
    (out / "bundles" / f".verify.json.{os.getpid()}-1.part").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_within_an_export_leaves_nothing_once_the_pipeline_is_held_again(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", WRITER, str(out)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == -signal.SIGKILL
    assert len(list((out / "bundles").iterdir())) == 4
    with hold(out, what="pipeline directory"):
        assert list((out / "bundles").iterdir()) == []


def test_what_a_running_process_writes_and_what_is_a_users_own_is_left(tmp_path):
    sub = tmp_path / "bundles"
    sub.mkdir()
    mine = [sub / f".ort-cpu.{os.getppid()}-abc_1.part", sub / ".hidden.part", sub / "ort-cpu.1-abc.part"]
    for folder in mine:
        folder.mkdir()
    gone = sub / f".ort-cpu.{2**22 + 5}-abc_1.old"
    gone.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (sub / f".link.{2**22 + 5}-a.part").symlink_to(elsewhere)
    remove_leftovers(tmp_path)
    assert sorted(sub.iterdir()) == sorted(mine)
    assert (elsewhere / "kept").exists()


def test_a_directory_being_written_names_its_process(tmp_path):
    with new_directory(tmp_path / "out", kind="model") as aside:
        assert aside.name.startswith(f".out.{os.getpid()}-")
        write_bytes(aside / "model.json", b"{}")
