"""Every command of docs/tutorial.md, in its order, on a few hundred small pictures; a real sshd plays the board."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from deploy.test_remote import board, boards, keys  # noqa: F401 - fixtures
from PIL import Image

from edgecl.data import demo_images

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
# At toy size; nothing of what a command does changes.
SHORTER = {
    "init": ("--hours 2", "--hours 0.01"),
    "pretrain": ("--out", "--set run.epochs=1 --out"),
    "pick": ("--count 40", "--count 12"),
    "finetune": ("--out", "--epochs 2 --out"),
    "bench": ("--precision", "--duration-s 0.2 --precision"),
    "watch": ("runs/photos", "runs/photos --port 0"),
}


def commands():
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def write(folder, split, count, *, labelled):
    pictures, labels = demo_images.render(split, count, size=40)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        place = folder / (demo_images.CLASSES[label] if labelled else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{index:04}.jpg", quality=92)


@pytest.fixture
def shell(tmp_path, board):  # noqa: F811
    """Run a line of the page in a folder with the three sets of pictures."""
    write(tmp_path / "photos", "train", 96, labelled=False)
    write(tmp_path / "labelled", "validation", 60, labelled=True)
    write(tmp_path / "held-out", "test", 240, labelled=True)
    program = tmp_path / "bin" / "edgecl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m edgecl "$@"\n')
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }

    def start(line, **how):
        line = line.replace("you@board", board.host)
        return subprocess.Popen(
            line, shell=True, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, **how
        )

    return start


@pytest.mark.slow
def test_every_command_of_the_page_works_as_it_stands(shell, tmp_path):
    lines = commands()
    assert len(lines) >= 13
    for line in lines:
        verb = line.split()[1]
        old, new = SHORTER.get(verb, ("", ""))
        assert old in line
        line = line.replace(old, new, 1) if old else line
        if verb == "watch":
            with shell(f"exec {line}") as process:
                with urllib.request.urlopen(process.stdout.readline().split()[0]) as page:
                    assert "steps" in page.read().decode()
                process.kill()
            continue
        out, _ = (process := shell(line)).communicate(timeout=240)
        assert process.returncode == 0, f"{line}\n{out}"
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 240
    assert {row["class_1"] for row in rows} <= set(demo_images.CLASSES)
    assert (tmp_path / "to-label.html").exists()
    assert list((tmp_path / "bundles" / "classifier").glob("bench-*.json"))
    assert (tmp_path / "published" / "README.md").exists()
    assert "What is confused" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
