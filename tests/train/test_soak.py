"""A long run at toy size: memory and file handles stay as they are."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

# An hour's steps of a small net on one GPU; EDGECL_SOAK_STEPS takes more.
STEPS = int(os.environ.get("EDGECL_SOAK_STEPS", "6000"))
# Until caches, arenas and the first checkpoints have their size.
WARM_UP = STEPS // 4
LIMIT_MIB = 1.0  # per 1,000 steps


def memory_mib(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))) / 1024


def last_step(metrics):
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return int(lines[-1].split('"step": ')[1].split(",")[0]) if lines and '"step": ' in lines[-1] else 0


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_and_handles_stay_flat(tmp_path, recipe_file, image_folder):
    """Pictures are decoded for every batch, checkpoints, records and looks at quality come often."""
    out = tmp_path / "run"
    settings = {
        "data.cache_mib": 0,
        "run.epochs": STEPS // 3,
        "run.log_every": 50,
        "run.quality_epochs": 100,
        "run.checkpoint_epochs": 50,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [
        *(sys.executable, "-m", "edgecl", "pretrain", str(recipe_file), "--data", str(image_folder)),
        *("--out", str(out), "--device", "cpu", *words),
    ]
    samples = []
    said = tmp_path / "stderr.txt"
    with (
        said.open("w") as stderr,
        subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=stderr) as process,
    ):
        while process.poll() is None:
            step = last_step(out / "metrics.jsonl")
            if step > WARM_UP and (not samples or step > samples[-1][0]):
                try:
                    handles = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
                    samples.append((step, memory_mib(process.pid), handles))
                except (FileNotFoundError, StopIteration):
                    break
            time.sleep(0.2)
    assert process.returncode == 0, said.read_text()
    steps, memory, handles = np.array(samples).T
    assert len(steps) > 20
    slope = np.polyfit(steps / 1000, memory, 1)[0]
    print(f"{slope:.3f} MiB per 1,000 steps over {int(steps[-1] - steps[0])} steps, {memory[-1]:.0f} MiB")
    assert slope < LIMIT_MIB
    # A file being written now and then is open; none may stay.
    assert np.median(handles[-10:]) <= np.median(handles[:10]) + 1
