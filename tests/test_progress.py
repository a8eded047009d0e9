"""Progress: silent for short work, plain lines where there is no terminal."""

import subprocess
import sys

import pytest

from edgecl import progress
from edgecl.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_short_work_prints_nothing(clock, capsys):
    with Progress("probe", total=10, unit="fits") as bar:
        for _ in range(10):
            clock.now += 0.1
            bar.advance()
    assert capsys.readouterr().err == ""


def test_long_work_prints_plain_lines_with_rate_and_time_left(clock, capsys):
    with Progress("pretrain", total=100, unit="steps") as bar:
        for _ in range(40):
            clock.now += 1.0
            bar.advance(note="loss 3")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "pretrain: 15/100 steps, 1 steps/s, 15 s gone, about 85 s left, loss 3"
    assert len(lines) == 3  # at 15 s, at 30 s, and at the end


def test_resumed_work_counts_only_its_own_rate(clock, capsys):
    with Progress("pretrain", total=100, unit="steps", done=50) as bar:
        for _ in range(20):
            clock.now += 1.0
            bar.advance()
    assert capsys.readouterr().err.splitlines()[0].startswith("pretrain: 65/100 steps, 1 steps/s")


def test_failed_work_prints_no_closing_line(clock, capsys):
    def work():
        with Progress("probe", total=2, unit="fits") as bar:
            clock.now += 3.0
            bar.advance()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert capsys.readouterr().err == ""


def test_work_of_unknown_length_shows_how_much_is_done(clock, capsys):
    with Progress("looking for images", total=None, unit="files") as bar:
        for _ in range(20):
            clock.now += 1.0
            bar.advance(1000)
    assert capsys.readouterr().err.splitlines() == [
        "looking for images: 15000 files, 1e+03 files/s, 15 s gone",
        "looking for images: 20000 files, 1e+03 files/s, 20 s gone",
    ]


def test_only_the_first_process_of_a_run_shows_any(clock, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with Progress("pretrain", total=40, unit="steps") as bar:
        for _ in range(40):
            clock.now += 1.0
            bar.advance()
    assert capsys.readouterr().err == ""


def test_progress_loads_without_torch():
    code = "import sys, edgecl.progress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
