"""The parts of gpu.sh, which says what they are, and the time each has.

No part's failure, and no missing package, ends the others: nothing but the standard library is imported here for good.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).parent
WHOLE_S = 9 * 60.0
# Where the cores are shared a toy waits for them: it is to go through, not to be timed.
TOY_WHOLE_S, TOY_PART_S = 30 * 60.0, 5 * 60.0
# Of the whole, for the arms; measuring ends where this begins.
ARMS_S = 4 * 60.0
# To stop the runs, and then to print their table.
STOPPING_S, TABLE_S = 8.0, 20.0
# A part with less time than this left would only be begun.
SHORTEST_S = 3.0


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        name: for the records.
        limit_s: after which it is ended.
        command: what is run, after the interpreter.
    """

    name: str
    limit_s: float
    command: tuple[str, ...]


def parts_on_gpu(given: argparse.Namespace, scratch: Path) -> list[Part]:
    """List what is measured on a GPU, the most wanted first."""
    here = str(BENCHMARKS / "gpu.py")
    cifar = ["--images", str(scratch / "cifar10" / "train")]
    step = [str(BENCHMARKS / "step.py"), "--device", "cuda", "--nets", "mobilenetv3_large_100"]
    step += ["--size", "224", "--batch", "256", "--rounds", "5", "--compile"]
    photos = [str(BENCHMARKS / "input.py"), "--device", "cuda", "--workers", str(os.cpu_count())]

    def pretrain(precision: str, *words: str) -> tuple[str, ...]:
        return (here, "--part", "pretrain", *cifar, "--precision", precision, *words)

    return [
        Part("machine", 40, (here, "--part", "machine")),
        Part("unpack", 60, (here, "--part", "unpack", "--cifar", given.cifar, "--images", cifar[1])),
        Part("pretrain bf16", 45, pretrain("bf16")),
        Part("pretrain fp32", 45, pretrain("fp32")),
        Part("input", 60, (*photos, "--images", "512", "--batch", "256", "--rounds", "3")),
        Part("step bf16", 90, (*step, "--precision", "bf16")),
        Part("pretrain bf16, compiled", 80, pretrain("bf16", "--compile")),
        Part("step fp32", 90, (*step, "--precision", "fp32")),
        Part("pretrain fp32, compiled", 80, pretrain("fp32", "--compile")),
    ]


def parts_as_toys() -> list[Part]:
    """List nearly the same parts, tiny and on a CPU; nvJPEG fails there, as any part may."""
    here = str(BENCHMARKS / "gpu.py")
    photos = [str(BENCHMARKS / "input.py"), "--photo", "96", "72", "--images", "4", "--rounds", "1"]
    return [
        Part("machine", TOY_PART_S, (here, "--part", "machine")),
        Part("pretrain fp32", TOY_PART_S, (here, "--part", "pretrain", "--toy", "--images", "demo")),
        Part("input", TOY_PART_S, (*photos, "--device", "cuda")),
    ]


class Turn:
    """One turn of gpu.sh: the time it has, and where it writes.

    Args:
        out: folder of the records.
        deadline: by time.monotonic(), when all must have ended.
    """

    def __init__(self, out: Path, deadline: float):
        self.out = out
        self.deadline = deadline
        self.children: list[subprocess.Popen] = []
        out.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, self._end)

    def _end(self, number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, **line: object) -> None:
        with (self.out / "parts.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({key: value for key, value in line.items() if key != "found"}), flush=True)

    def measure(self, part: Part, *, keep_s: float) -> None:
        """Run one part and write down what it found, or why it found nothing.

        Args:
            part: what to run.
            keep_s: seconds before the deadline that belong to others.
        """
        limit = min(part.limit_s, self.left_s - keep_s)
        if limit < SHORTEST_S:
            self.record(part=part.name, left_out="no time left")
            return
        started = time.monotonic()
        with (self.out / "log.txt").open("a") as log, GpuUse() as use:
            log.write(f"--- {part.name}\n")
            log.flush()
            with tempfile.TemporaryFile("w+") as said:
                code = self._wait(self.start(part.command, stdout=said, stderr=log), limit)
                said.seek(0)
                text = said.read()
            log.write(text)
        line: dict = {"part": part.name, "seconds": round(time.monotonic() - started, 1), "exit": code}
        if code is None:
            line["failed"] = f"ended after {limit:.0f} s"
        elif code:
            line["failed"] = f"ended with {code}; log.txt says why"
        with contextlib.suppress(ValueError, IndexError):
            line["found"] = json.loads(text.splitlines()[-1])
        self.record(**line, gpu=use.medians())

    def start(self, command: tuple[str, ...], **streams: object) -> subprocess.Popen:
        """Start a command in a process group of its own, so that it ends with its children."""
        child = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.DEVNULL, start_new_session=True, **streams
        )
        self.children.append(child)
        return child

    def _wait(self, child: subprocess.Popen, limit: float) -> int | None:
        """Return the exit status; None for one that had to be ended."""
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            end(child, signal.SIGKILL)
            return None

    def close(self) -> None:
        """End what still runs."""
        for child in self.children:
            if child.poll() is None:
                end(child, signal.SIGKILL)


def end(child: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
    if number == signal.SIGKILL:
        child.wait()


class GpuUse:
    """Sample nvidia-smi while a part runs; without nvidia-smi there is nothing to sample."""

    FIELDS = ("utilization.gpu", "memory.used", "power.draw", "clocks.sm")

    def __enter__(self) -> GpuUse:
        self._sampler = self._said = None
        if shutil.which("nvidia-smi"):
            self._said = tempfile.TemporaryFile("w+")
            query = [f"--query-gpu={','.join(self.FIELDS)}", "--format=csv,noheader,nounits", "-lms", "500"]
            self._sampler = subprocess.Popen(["nvidia-smi", *query], stdout=self._said)
        return self

    def __exit__(self, *exception: object) -> None:
        self.samples: list[list[float]] = []
        if self._sampler and self._said:
            self._sampler.terminate()
            self._sampler.wait()
            self._said.seek(0)
            for line in self._said:
                with contextlib.suppress(ValueError):  # the last one may be cut
                    self.samples.append([float(value) for value in line.split(",")])
            self._said.close()

    def medians(self) -> dict[str, float] | None:
        """Return the medians over the samples in which the GPU was at work: a part begins with imports and reading."""
        whole = [sample for sample in self.samples if len(sample) == len(self.FIELDS) and sample[0] > 0]
        if not whole:
            return None
        columns = dict(zip(self.FIELDS, zip(*whole, strict=True), strict=True))
        medians = {name: statistics.median(values) for name, values in columns.items()}
        return {**medians, "samples": len(whole), "of": len(self.samples)}


def train_arms(turn: Turn, command: tuple[str, ...], directory: Path, *, workers: int) -> None:
    """Train the arms, several runs side by side, until little time is left; results are copied as they come."""
    started, last = time.monotonic(), turn.out / "results.jsonl"
    results = directory / "results.jsonl"
    with (turn.out / "log.txt").open("a") as log, GpuUse() as use:
        log.write("--- arms\n")
        log.flush()
        children = [turn.start(command, stdout=subprocess.DEVNULL, stderr=log) for _ in range(workers)]
        try:
            while any(child.poll() is None for child in children) and turn.left_s > STOPPING_S + TABLE_S:
                time.sleep(1)
                copy_whole(results, last)
            for child in children:
                end(child, signal.SIGTERM)
            while any(child.poll() is None for child in children) and turn.left_s > TABLE_S:
                time.sleep(0.2)
            for child in children:
                end(child, signal.SIGKILL)
        finally:
            copy_whole(results, last)
    turn.record(
        part="arms",
        seconds=round(time.monotonic() - started, 1),
        exit=max(child.returncode for child in children),
        runs_side_by_side=workers,
        finished=len(last.read_text().splitlines()) if last.exists() else 0,
        gpu=use.medians(),
    )
    table = turn.start((*command, "--table"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        said, _ = table.communicate(timeout=max(1.0, turn.left_s))
        (turn.out / "table.md").write_text(said)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file that grows, so that the copy is whole at any moment."""
    if source.exists() and (not target.exists() or source.stat().st_size != target.stat().st_size):
        aside = target.with_suffix(".part")
        shutil.copyfile(source, aside)
        aside.replace(target)


# --- parts, each in a process of its own ---


def machine(given: argparse.Namespace) -> dict:
    """Say what the machine is, and whether NCCL has anything to do."""
    from importlib import metadata

    import torch
    from timing import processor

    names = ("torch", "torchvision", "timm", "accelerate", "numpy", "pydantic", "simplejpeg", "fvcore")
    cards = torch.cuda.device_count()
    found = {
        "processor": processor()[0],
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(card) for card in range(cards)],
        "memory_gib": [
            round(torch.cuda.get_device_properties(card).total_memory / 2**30, 1) for card in range(cards)
        ],
        "cuda": torch.version.cuda,
        "versions": {name: metadata.version(name) for name in names},
        "nccl": f"absent: {cards} GPU(s), and it takes two; `edgecl selftest ddp` on a machine with several tells",
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        found["driver, highest clock"] = subprocess.run(query, capture_output=True, text=True).stdout.split(
            "\n"
        )[0]
    if cards > 1:
        words = ["-m", "torch.distributed.run", f"--nproc-per-node={cards}", "-m", "edgecl"]
        done = subprocess.run([sys.executable, *words, "selftest", "ddp"], capture_output=True, text=True)
        found["nccl"] = done.stdout
    return found


def unpack(given: argparse.Namespace) -> dict:
    """Unpack CIFAR-10's training images."""
    with tarfile.open(Path(given.cifar) / "train.tar.xz") as archive:
        archive.extractall(given.images, filter="data")
    return {"files": sum(1 for path in Path(given.images).rglob("*") if path.is_file())}


def pretrain_steps(given: argparse.Namespace) -> dict:
    """Train for some dozen steps as `edgecl pretrain` does; return images/s once it is warm."""
    from edgecl.config.recipe import read_recipe
    from edgecl.train.monitor import read_metrics
    from edgecl.train.pretrain import pretrain

    name = str(BENCHMARKS / "tiny.toml") if given.toy else "cifar10-smoke"
    size = ["data.limit=64"] if given.toy else ["data.limit=10240", "data.batch_size=512", "run.epochs=8"]
    settings = [*size, f"run.precision={given.precision}", f"run.compile={str(given.compile).lower()}"]
    recipe = read_recipe(name, [*settings, "run.log_every=2", "run.quality_epochs=1000"])
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        record = pretrain(
            recipe,
            recipe_name=name,
            out=out,
            data=given.images,
            device="auto",
        )
        rates = [one["images_per_s"] for one in read_metrics(out / "metrics.jsonl") if "images_per_s" in one]
    # The first steps compile, tune and fill caches.
    warm = rates[len(rates) // 2 :]
    rate = statistics.median(warm)
    return {
        "method": record.method,
        "device": record.device,
        "precision": given.precision,
        "compiled": given.compile,
        "batch": recipe.data.batch_size,
        "image_size": recipe.data.image_size,
        "images_per_s": rate,
        "step_ms": 1e3 * recipe.data.batch_size / rate,
        "records": len(warm),
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict]] = {
    "machine": machine,
    "unpack": unpack,
    "pretrain": pretrain_steps,
}


def main() -> None:
    options = argparse.ArgumentParser(prog="gpu.sh", description="See the head of gpu.sh.")
    options.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder of the records")
    options.add_argument("--cifar", help="folder with CIFAR-10's train.tar.xz")
    options.add_argument("--results", type=Path, help="results.jsonl of an earlier turn")
    options.add_argument("--workers", type=int, help="runs side by side [default: 6; toy: 2]")
    options.add_argument("--toy", action="store_true", help="tiny, on a CPU")
    for hidden in ("--part", "--images"):
        options.add_argument(hidden, help=argparse.SUPPRESS)
    options.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    options.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--spent", type=float, default=0.0, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.part:
        print(json.dumps(PARTS[given.part](given)))
        return
    if given.out is None:
        options.error("where shall the records go? --out DIR")
    if not (given.toy or given.cifar):
        options.error("--cifar FOLDER, with train.tar.xz in it")
    take_turn(given)


def take_turn(given: argparse.Namespace) -> None:
    """Measure, then train, and be done in time."""
    whole = TOY_WHOLE_S if given.toy else WHOLE_S
    turn = Turn(given.out, time.monotonic() + whole - given.spent)
    scratch = Path(tempfile.mkdtemp(prefix="edgecl-gpu-"))
    directory = scratch / "arms"
    directory.mkdir()
    if given.results:
        shutil.copyfile(given.results, directory / "results.jsonl")
    name, data, device = "cifar10-gpu", str(scratch / "cifar10" / "train"), "cuda"
    if given.toy:
        name, data, device = "toy", "demo", "cpu"
    listed = str(BENCHMARKS / "campaigns" / f"{name}.toml")
    arms = (str(BENCHMARKS / "arms.py"), listed, "--data", data, "--out", str(directory), "--device", device)
    try:
        for part in parts_as_toys() if given.toy else parts_on_gpu(given, scratch):
            turn.measure(part, keep_s=ARMS_S)
        train_arms(turn, arms, directory, workers=given.workers or (2 if given.toy else 6))
    finally:
        turn.close()
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
