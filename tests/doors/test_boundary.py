"""Whatever the system refuses is a text with a reason and a place; streams and signals that are odd are no failure."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import edgecl.cli
from edgecl.cli import main
from edgecl.config.recipe import read_recipe

LONG = "x" * 300
NOBODY = 65534


@pytest.mark.parametrize(
    "words",
    [
        ["cost", f"{LONG}.toml"],
        ["cost", f"/{LONG}"],
        ["verify", f"/{LONG}"],
        ["carve", f"/{LONG}", "--out", "/nowhere/x"],
        ["report", f"/{LONG}", "--out", "/nowhere/x"],
        ["pretrain", "demo", "--out", f"/tmp/{LONG}", "--device", "cpu"],
        ["export", "m", "--target", f"{LONG}.toml", "--out", "/nowhere/x"],
    ],
    ids=lambda words: words[0],
)
def test_a_name_that_is_too_long_is_named(edgecl, words):
    code, _, said = edgecl(*words)
    assert code == 1
    assert "file name too long" in said.lower()
    assert LONG[:100] in said


def test_a_file_that_cannot_be_read_for_a_fault_of_the_disk_is_named(edgecl, monkeypatch, tmp_path):
    file = tmp_path / "r.toml"
    file.write_text("[host]\n", encoding="utf-8")

    class Failing:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, size=-1):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: Failing() if self == file else opened(self, *a, **k)
    )
    code, _, said = edgecl("cost", file)
    assert code == 1
    assert "input/output error" in said.lower()
    assert str(file) in said


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux only")
def test_a_recipe_that_the_kernel_does_not_let_be_read_is_named(edgecl, tmp_path):
    link = tmp_path / "mem.toml"
    link.symlink_to("/proc/self/mem")
    code, _, said = edgecl("cost", link)
    assert code == 1
    assert str(link) in said


def test_debug_shows_the_stack_of_an_error_of_the_system(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["edgecl", "--debug", "cost", f"/{LONG}"])
    with pytest.raises(OSError, match="too long"):
        main()


def test_memory_that_runs_out_is_named(edgecl, monkeypatch):
    def greedy(*words, **options):
        raise MemoryError

    monkeypatch.setattr("edgecl.cli.commands.app", greedy)
    monkeypatch.setattr("edgecl.cli.commands.given.debug", False)
    code, _, said = edgecl("ls")
    assert (code, said.splitlines()[0]) == (1, "edgecl: not enough memory")


def test_an_error_of_our_own_is_not_hidden(edgecl, monkeypatch):
    def faulty(*words, **options):
        raise TypeError("a bug")

    monkeypatch.setattr("edgecl.cli.commands.app", faulty)
    monkeypatch.setattr("edgecl.cli.commands.given.debug", False)
    with pytest.raises(TypeError, match="a bug"):
        edgecl("ls")


def in_a_process(code, *words, before=(), **options):
    return subprocess.run(
        [*before, sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        **options,
    )


ROOT = os.geteuid() == 0


@pytest.mark.skipif(ROOT and not shutil.which("setpriv"), reason="root may read everything")
def test_what_a_user_may_not_read_is_named_with_its_path(tmp_path):
    """Each command in turn, in one process; one of root's gives up the right to read what is another user's."""
    closed, file, net = tmp_path / "closed", tmp_path / "unreadable.toml", tmp_path / "net"
    closed.mkdir()
    net.mkdir()
    file.write_text("[host]\n", encoding="utf-8")
    (net / "model.json").write_text("{}", encoding="utf-8")
    for path in (closed, file, net / "model.json"):
        path.chmod(0)
        if ROOT:
            os.chown(path, NOBODY, NOBODY)
    out = ["--out", str(tmp_path / "o")]
    commands = [
        ["cost", str(closed / "m")],
        ["cost", str(file)],
        ["verify", str(closed / "b")],
        ["carve", str(closed / "r"), *out],
        ["report", str(closed / "m"), *out],
        ["report", str(net), *out],
        ["report", "diff", str(closed / "a"), str(closed / "b")],
        ["export", str(closed / "m"), "--target", "ort-cpu", *out],
        ["pretrain", "demo", "--out", str(closed / "o"), "--device", "cpu"],
    ]
    code = (
        "import json, sys\n"
        "from edgecl.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['edgecl', *words]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        print(end.code)\n"
    )
    before = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if ROOT else []
    try:
        done = in_a_process(code, json.dumps(commands), before=before, timeout=120)
    finally:
        closed.chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"] * len(commands), done.stdout + done.stderr
    assert done.stderr.lower().count("permission") == len(commands), done.stderr
    assert "Traceback" not in done.stderr


def test_closed_streams_are_no_failure(tmp_path):
    """Nor do the files that are opened next get what is printed."""
    for redirection in (">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["/bin/sh", "-c", f'"{sys.executable}" -m edgecl ls recipes {redirection}'],
            capture_output=True,
            text=True,
            cwd=Path(edgecl.cli.__file__).parents[2],
        )
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), redirection


def test_output_that_knows_ascii_only_gets_escapes(tmp_path):
    from reports.conftest import Maker

    model = Maker().model(tmp_path / "größe")
    done = subprocess.run(
        [sys.executable, "-m", "edgecl", "report", str(model), "--out", str(tmp_path / "r")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        cwd=Path(edgecl.cli.__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert b"gr\\xf6\\xdfe" in done.stdout
    assert (tmp_path / "r" / "report.html").exists()


def test_a_working_directory_that_is_gone_is_named(tmp_path):
    from reports.conftest import Maker

    model = Maker().model(tmp_path / "net")
    code = (
        "import os, shutil, sys\n"
        "from edgecl.cli import main\n"
        "gone = sys.argv[1]; os.mkdir(gone); os.chdir(gone); os.rmdir(gone)\n"
        "sys.argv = ['edgecl', 'report', sys.argv[2], '--out', 'r']\n"
        "main()\n"
    )
    done = in_a_process(code, tmp_path / "gone", model)
    assert done.returncode == 1
    assert done.stderr.startswith("edgecl: ")
    assert "working directory is gone" in done.stderr


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, -signal.SIGINT, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_while_the_commands_are_imported_ends_with_one_line(tmp_path, number, status, word):
    """The import of typer, which the commands need, is held up until the signal is there."""
    (tmp_path / "typer.py").write_text(
        "import sys, time\nsys.stdout.write('importing\\n'); sys.stdout.flush()\ntime.sleep(60)\n",
        encoding="utf-8",
    )
    with subprocess.Popen(
        [sys.executable, "-m", "edgecl", "ls"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        cwd=tmp_path,  # where `-m` looks first
    ) as process:
        assert process.stdout.readline() == "importing\n"
        time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (status, f"edgecl: {word}\n")


def test_a_recipe_may_have_a_byte_order_mark(tmp_path):
    file = tmp_path / "bom.toml"
    file.write_bytes(b"\xef\xbb\xbf[host]\narch = 'resnet18'\n")
    assert read_recipe(str(file)).host.arch == "resnet18"
