"""Small real things that many tests look at, each made once: images, a run, a net carved from it, a bundle.

Whoever changes one of them works on a copy.
"""

from __future__ import annotations

import os

# Before torch is loaded, here and in the processes the tests start: with one thread sums have one order, so that
# "bit for bit" means something, and nets this small are slower with two.
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

# A shell that starts pytest in the background has it ignore Ctrl-C, and the processes that tests start with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

COLORS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 40, 50)}

# The startup benchmark trains with it too.
TINY_RECIPE = Path(__file__).parents[1] / "benchmarks" / "tiny.toml"


def write_folder(root: Path, *, per_class: int, side: int = 32, classes: dict[str, Any] = COLORS) -> Path:
    """Write noisy pictures that even a random net can tell apart, in class folders."""
    random = np.random.default_rng(0)
    for name, color in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = np.array(color) + random.normal(0, 25, (side, side, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{index:03}.png")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 pictures of 32 pixels in 3 class folders."""
    return write_folder(tmp_path_factory.mktemp("data") / "colors", per_class=20)


@pytest.fixture(scope="session")
def unlabelled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 pictures without class folders."""
    root = write_folder(tmp_path_factory.mktemp("data") / "plain", per_class=24, classes={"": (90, 90, 160)})
    assert len(list(root.glob("*.png"))) == 24
    return root


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains in a second."""
    return Path(shutil.copy(TINY_RECIPE, tmp_path_factory.mktemp("recipe")))


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, recipe_file: Path) -> Path:
    """A finished run directory of the tiny recipe."""
    from edgecl.config.recipe import read_recipe
    from edgecl.train.pretrain import pretrain

    out = tmp_path_factory.mktemp("run") / "run"
    pretrain(read_recipe(str(recipe_file)), recipe_name="tiny", out=out, data=str(image_folder), device="cpu")
    return out


@pytest.fixture(scope="session")
def carved_model(tmp_path_factory: pytest.TempPathFactory, trained_run: Path) -> Path:
    """The model directory carved from the run."""
    from edgecl.train.carve import carve

    out = tmp_path_factory.mktemp("model") / "slim"
    carve(trained_run, out=out)
    return out


@pytest.fixture(scope="session")
def exported_bundle(tmp_path_factory: pytest.TempPathFactory, carved_model: Path) -> Path:
    """The bundle of the carved net for ort-cpu."""
    from edgecl.deploy.export import export

    out = tmp_path_factory.mktemp("bundle") / "bundle"
    export(carved_model, target="ort-cpu", out=out)
    return out


@pytest.fixture(scope="session")
def edgecl_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own, as a user does."""

    def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **options.pop("env", {})}
        return subprocess.run(
            [sys.executable, "-m", "edgecl", *map(str, words)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=options.pop("cwd", Path(__file__).parent.parent),
            **options,
        )

    return run


@pytest.fixture(name="edgecl")
def command_in_this_process(monkeypatch, capsys):
    """Run the command line in this process; return its exit code, stdout and stderr."""
    from edgecl.cli import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["edgecl", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
