"""Measure how long the command line takes to start, and which imports that is; prints tables and one JSON line.

    python benchmarks/startup.py

Fresh processes of `edgecl --help`, `ls`, `bench` (of a tiny bundle, sampling for a millisecond) and `pretrain` (a tiny
recipe, up to its first step) take turns, every other round backwards, each with one thread. Beside them stand the
interpreter alone and `import torch`. Time on the clock and processor time, medians; the first round is thrown away, so
files lie in the system's cache. Then each command runs once more under -X importtime.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from timing import conditions_of, in_turns, options_of, table

RECIPE = Path(__file__).with_name("tiny.toml")
TOP = 6
SHOWN = {"help": "--help"}
WAIT_S = 300.0


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--core", type=int, help="pin to this core [default: leave it to the system]")
    options.add_argument("--only", nargs="+", choices=["help", "ls", "bench", "pretrain"])
    given = options.parse_args()
    if given.core is not None:
        os.sched_setaffinity(0, {given.core})
    os.environ["OMP_NUM_THREADS"] = "1"
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        commands = prepare(Path(scratch), given.only or ["help", "ls", "bench", "pretrain"])
        spent: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for index, name in in_turns(commands, given.rounds + 1):
            one = commands[name]()
            if index:
                spent[name].append(one)
        imports = {
            name: imports_of(Path(scratch), name) for name in commands if not name.startswith("python")
        }
    results = {
        name: {
            "wall_s": statistics.median(one["wall_s"] for one in runs),
            "processor_s": statistics.median(one["processor_s"] for one in runs),
            "fastest_wall_s": min(one["wall_s"] for one in runs),
        }
        for name, runs in spent.items()
    }
    conditions = conditions_of(load_before, pinned_to_core=given.core, threads=1, rounds=given.rounds)
    print_tables(results, imports, conditions)
    print(
        json.dumps({"benchmark": "startup", "conditions": conditions, "results": results, "imports": imports})
    )


def prepare(scratch: Path, wanted: list[str]) -> dict[str, Callable[[], dict[str, float]]]:
    """Make what the commands need, and return them."""
    commands: dict[str, Callable[[], dict[str, float]]] = {
        "python -c pass": lambda: whole("-c", "pass"),
    }
    if "pretrain" in wanted:
        commands["python -c 'import torch'"] = lambda: whole("-c", "import torch")
    if "help" in wanted:
        commands["help"] = lambda: whole(*words_of(scratch, "help"))
    if "ls" in wanted:
        commands["ls"] = lambda: whole(*words_of(scratch, "ls"))
    if "bench" in wanted or "pretrain" in wanted:
        write_images(scratch / "images")
    if "bench" in wanted:
        run = scratch / "for-bench"
        edgecl = ("-m", "edgecl")
        whole(*edgecl, "pretrain", RECIPE, "--data", scratch / "images", "--out", run)
        whole(*edgecl, "carve", run, "--out", scratch / "slim")
        target = ("--target", "ort-cpu", "--precision", "fp32")
        whole(*edgecl, "export", scratch / "slim", *target, "--out", scratch / "bundle")
        commands["bench"] = lambda: whole(*words_of(scratch, "bench"))
    if "pretrain" in wanted:
        commands["pretrain"] = lambda: first_step(scratch)
    return commands


def words_of(scratch: Path, name: str) -> tuple[object, ...]:
    """Return a command as arguments of the interpreter."""
    rest: dict[str, tuple[object, ...]] = {
        "help": ("--help",),
        "ls": ("ls",),
        "bench": ("bench", scratch / "bundle", "--duration-s", "0.001", "--threads", "1"),
        "pretrain": (
            *("pretrain", RECIPE, "--data", scratch / "images", "--device", "cpu"),
            *("--out", scratch / "run", "--force"),
        ),
    }
    return ("-m", "edgecl", *rest[name])


def write_images(folder: Path) -> None:
    """Write 32 pictures of noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    folder.mkdir()
    for index in range(32):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")


def whole(*words: object) -> dict[str, float]:
    """Run a process to its end."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, *map(str, words)], stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(map(str, words))} failed:\n{said.read().decode()}")
    return {"wall_s": wall, "processor_s": usage.ru_utime + usage.ru_stime}


def first_step(scratch: Path) -> dict[str, float]:
    """Run pretrain until its first step is on record, then end it."""
    metrics = scratch / "run" / "metrics.jsonl"
    if metrics.exists():
        metrics.unlink()
    words = [sys.executable, *map(str, words_of(scratch, "pretrain"))]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, stdout=said, stderr=said)
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None or time.perf_counter() - started > WAIT_S:
                    said.seek(0)
                    raise SystemExit(f"pretrain made no step:\n{said.read().decode()}")
                time.sleep(0.002)
            wall = time.perf_counter() - started
            processor = processor_s(process.pid)
        finally:
            process.kill()
            process.wait()
    return {"wall_s": wall, "processor_s": processor}


def processor_s(pid: int) -> float:
    """Return the processor time of a process that still runs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def imports_of(scratch: Path, name: str) -> dict:
    """Say which packages' modules took how long to import, in a run of their own.

    Returns:
        {"total_s", "modules", "packages": seconds by top-level package, the most first}.
    """
    words = [sys.executable, "-X", "importtime", *map(str, words_of(scratch, name))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S)
    packages: Counter[str] = Counter()
    modules = 0
    for line in done.stderr.splitlines():
        found = re.match(r"import time:\s+(\d+) \|\s+\d+ \| +(\S+)", line)
        if found:
            packages[found[2].partition(".")[0]] += int(found[1])
            modules += 1
    return {
        "total_s": sum(packages.values()) / 1e6,
        "modules": modules,
        "packages": {package: spent / 1e6 for package, spent in packages.most_common(TOP)},
    }


def print_tables(results: dict[str, dict], imports: dict[str, dict], conditions: dict) -> None:
    """Print conditions, one row per command, and where its imports' time goes."""
    print(
        f"{conditions['name']}, 1 thread, Python {conditions['versions']['python']}, medians of "
        f"{conditions['rounds']} processes; load {conditions['load_before']} before, {conditions['load_after']} after\n"
    )
    body = []
    for name, one in results.items():
        shown = name if name.startswith("python") else f"edgecl {SHOWN.get(name, name)}"
        shown += " to its first step" if name == "pretrain" else ""
        body.append([shown, *(f"{one[key]:.3f}" for key in ("wall_s", "processor_s", "fastest_wall_s"))])
    print(table(["command", "wall s", "processor s", "fastest wall s"], body))
    body = []
    for name, one in imports.items():
        most = ", ".join(f"{package} {seconds:.3f}" for package, seconds in one["packages"].items())
        body.append([f"edgecl {SHOWN.get(name, name)}", str(one["modules"]), f"{one['total_s']:.3f}", most])
    print("\n" + table(["command", "modules", "imports s", "the most, by package"], body))


if __name__ == "__main__":
    main()
