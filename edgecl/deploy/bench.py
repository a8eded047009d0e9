"""Measure a bundle on this machine, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edgecl
from edgecl.artifacts import Bundle, record_header, write_json
from edgecl.deploy.verify import error_from_onboard
from edgecl.errors import DeviceError
from edgecl.onboard.bench import PROGRESS
from edgecl.onboard.bundle import sha256_of_file
from edgecl.onboard.passport import available_cores

# The device code, started where edgecl lies, so that neither the caller's directory nor an editable
# install decides which edgecl is measured with.
_ONBOARD = [sys.executable, "-m", "edgecl.onboard"]
_HOME = Path(edgecl.__file__).parent.parent


def bench(
    bundle: Path,
    *,
    duration_s: float = 10.0,
    threads: int | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time the net of a bundle and keep the record in it, as `bench-DEVICE.json`.

    The process that measures imports NumPy and the runtime, nothing else that is heavy, and runs one session.

    Args:
        bundle: the directory.
        duration_s: seconds to sample for, > 0; sampling goes on to 1,000 samples, within limits.
        threads: how many to compute with, >= 1; every core this process may run on where None.
        report: called about once a second with a line on how far it is.

    Returns:
        The record; see `edgecl.onboard.bench.bench` for its numbers.

    Raises:
        ArtifactError: not a bundle, or a file is missing or changed.
        DeviceError: the runtime is not installed or cannot load the net, or the measuring process died.
    """
    directory = Bundle(bundle)
    directory.read()
    header = record_header("bench", made_from=sha256_of_file(directory.record_file))
    threads = available_cores() if threads is None else threads
    verb = ["bench", str(bundle.resolve()), "--duration-s", repr(duration_s), "--threads", str(threads)]
    record = {**header, **_run_onboard(verb, threads=threads, bundle=bundle, report=report)}
    write_json(directory.bench_file(record["device"]["name"]), record)
    return record


def _run_onboard(
    verb: list[str], *, threads: int, bundle: Path, report: Callable[[str], None] | None
) -> dict[str, Any]:
    """Run the device code in a process of its own and return its JSON."""
    pinned = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
    words: deque[str] = deque(maxlen=20)
    with tempfile.TemporaryFile() as answer:
        with subprocess.Popen(
            [*_ONBOARD, *verb],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            cwd=_HOME,
            env={**os.environ, **pinned},
        ) as process:
            try:
                assert process.stderr is not None
                for line in process.stderr:
                    if not line.startswith(PROGRESS):
                        words.append(line.rstrip())
                    elif report:
                        report(line[len(PROGRESS) :].rstrip())
                status = process.wait()
            except BaseException:
                process.kill()
                raise
        answer.seek(0)
        text = answer.read().decode("utf-8", "replace")
    if status < 0:
        raise DeviceError(
            f"the measuring process was killed by {_signal_name(-status)}",
            where={"bundle": bundle},
            hint="SIGKILL often means that memory ran out (see `dmesg`); close other programs and try again"
            if -status == signal.SIGKILL
            else "try again; if it happens again, try another version of the runtime",
        )
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        record = None
    if isinstance(record, dict) and "error" in record:
        error = record["error"]
        raise error_from_onboard(error["name"], error["problem"], error["hint"], bundle=bundle)
    if status != 0 or not isinstance(record, dict):
        raise DeviceError(
            f"the measuring process ended with exit status {status} and no record",
            where={"bundle": bundle, "it said": " | ".join(words) or "nothing"},
        )
    return record


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} ({number})"
    except ValueError:
        return f"signal {number}"
