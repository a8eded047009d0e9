"""Completion in a shell: installed by the command itself, and it knows verbs and options."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The command as it is installed: its name decides which variable asks it to complete.
COMMAND = "import sys; sys.argv[0] = 'edgecl'; from edgecl.cli import program; program()"


def edgecl(*words, **environment):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def completed(line):
    """What bash is offered for the last word of a line."""
    words = line.split(" ")
    return edgecl(_EDGECL_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("edgecl pre", ["pretrain", "predict"]),
        ("edgecl export --pre", ["--precision"]),
        ("edgecl selftest d", ["ddp"]),
    ],
)
def test_bash_is_offered_verbs_and_options(line, offered):
    assert completed(line) == offered


def test_bash_is_offered_every_verb():
    assert {"pretrain", "carve", "probe", "finetune", "cost", "export", "verify", "bench", "report"} <= set(
        completed("edgecl ")
    )


def test_completion_installs_itself(tmp_path):
    edgecl("--install-completion", "bash", HOME=str(tmp_path))
    assert "_EDGECL_COMPLETE" in (tmp_path / ".bash_completions" / "edgecl.sh").read_text()
    assert "edgecl.sh" in (tmp_path / ".bashrc").read_text()
