"""The readers of what strangers send most often, fuzzed by coverage in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .readers import corpus

RUNS = int(os.environ.get("EDGECL_FUZZ_RUNS", "100000"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("atheris") is None, reason="needs atheris: pip install '.[fuzz]'"
    ),
]


@pytest.mark.parametrize("reader", ["tar", "manifest", "metrics", "onnx"])
def test_no_input_that_reaches_new_code_breaks_a_reader(reader, tmp_path, trained_run, exported_bundle):
    seeds = {
        "tar": corpus((".tar",)),
        "manifest": [(exported_bundle / "manifest.json").read_bytes()],
        "metrics": [(trained_run / "metrics.jsonl").read_bytes()],
        "onnx": corpus((".onnx",)),
    }
    for number, content in enumerate(seeds[reader]):
        (tmp_path / f"seed-{number}").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.guided", reader, str(tmp_path), str(RUNS)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    broke = [path.read_bytes()[:200] for path in tmp_path.glob("broke-*")]
    assert done.returncode == 0, f"{broke}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Done" in done.stderr, "the fuzzer did not run"
