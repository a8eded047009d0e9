"""What the benchmarks share: options, turns, processes that answer, the machine, tables."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

# Instructions that decide which kernels a processor runs.
ISA = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"),
    *("asimddp", "sve"),
)


def options_of(doc: str) -> argparse.ArgumentParser:
    """Return a parser whose help is a script's own."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def in_turns(names: Iterable[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Give round and name, every other round backwards, so that no way always follows the same one."""
    for index in range(rounds):
        for name in list(names)[:: 1 if index % 2 == 0 else -1]:
            yield index, name


def ratio_of(ours: Sequence[float], theirs: Sequence[float], name: str) -> dict:
    """Return under this name the median over rounds of theirs over ours within a round, and the range."""
    each = [other / own for own, other in zip(ours, theirs, strict=True)]
    return {name: statistics.median(each), "range": [min(each), max(each)]}


def processor() -> tuple[str, list[str]]:
    """Return the processor's name, and which of ISA it has."""
    name, flags = platform.machine(), set()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    return name, [flag for flag in ISA if flag in flags]


def conditions_of(load_before: float, packages: Sequence[str] = (), **settings: object) -> dict:
    """Say on what, beside what and with which settings it was measured."""
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "name": processor()[0],
        "cores": os.cpu_count(),
        **settings,
        "load_before": round(load_before, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


class Server:
    """A process that answers every line with a line of JSON; what else it prints is passed over."""

    def __init__(self, *words: object, **environment: str):
        self._process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def ask(self, order: str) -> dict:
        """Have the process do something, and return its answer."""
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a process ended while it was to '{order}'")

    def close(self) -> None:
        """End the process and wait for it."""
        self._process.stdin.close()
        self._process.wait()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])
