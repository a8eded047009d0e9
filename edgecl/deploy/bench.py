"""Measure a bundle, on this machine in a process of its own or on a board over ssh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgecl.deploy.process import error_from_onboard, run_here, silence_s
from edgecl.deploy.remote import run_on_board
from edgecl.errors import DeviceError
from edgecl.onboard.bundle import choose_precision, read_manifest, sha256_of_file
from edgecl.onboard.device_info import available_cores
from edgecl.onboard.errors import OnboardError
from edgecl.storage.directories import Bundle
from edgecl.storage.raw_records import record_header
from edgecl.storage.writing import write_json


def bench(
    bundle: Path,
    *,
    precisions: Sequence[str] | None = None,
    runtime: str | None = None,
    duration_s: float = 10.0,
    threads: int | None = None,
    power: bool = True,
    host: str | None = None,
    ssh_options: Sequence[str] = (),
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time the nets of a bundle and keep the record in it; see `edgecl.onboard.bundle.bench_name` for its name.

    The process that measures imports NumPy and the runtime, nothing else that is heavy, and runs one session, in
    which several precisions take turns.

    Args:
        bundle: the directory.
        precisions: which to measure; the bundle's default alone where None.
        runtime: "ort", "openvino", "tensorrt", "tensorrt_rtx" or "trtexec"; the bundle's own where None.
        duration_s: seconds to sample for, > 0; sampling goes on to a least number of samples, within limits.
        threads: how many to compute with, >= 1; every core the process may run on where None.
        power: read the board's power rails, where it has any.
        host: USER@BOARD[:PORT] to measure on, by `edgecl.deploy.remote`; this machine where None.
        ssh_options: further arguments for `ssh`.
        report: called about once a second with a line on how far it is.

    Returns:
        The record; see `edgecl.onboard.bench.bench` for its numbers. `onboard_command` is what ran on the device.

    Raises:
        ArtifactError: not a bundle, it lacks a precision, or a file is missing or changed.
        DeviceError: the runtime is not installed or cannot load the net, the measuring process died or
            was silent for too long, or the board cannot be reached or used.
    """
    directory = Bundle(bundle)
    manifest = directory.read()
    header = record_header("bench", made_from=sha256_of_file(directory.record_file))
    where = {"bundle": bundle} if host is None else {"bundle": bundle, "board": host}
    arguments = ["--duration-s", repr(duration_s)]
    for precision in precisions or ():
        arguments += ["--precision", precision]
    arguments += [] if runtime is None else ["--runtime", runtime]
    arguments += [] if power else ["--no-power"]
    try:
        held = read_manifest(bundle)  # by the device's rules, before anything is copied or started
        for precision in precisions or ():
            choose_precision(held, precision)
        if host is None:
            threads = available_cores() if threads is None else threads
            arguments += ["--threads", str(threads)]
            record = run_here(
                ["bench", str(bundle.resolve()), *arguments],
                threads=threads,
                limit_s=silence_s(runtime or held["runtime"]),
                report=report,
            )
        else:
            arguments += [] if threads is None else ["--threads", str(threads)]
            record = run_on_board(
                host,
                "bench",
                arguments,
                bundle=bundle,
                threads=threads,
                ssh_options=ssh_options,
                report=report,
            )
    except OnboardError as error:
        raise error_from_onboard(error, where=where) from error
    # What one types again, and what it started where the net ran.
    record = {**header, **record, "command": header["command"], "onboard_command": record.get("command")}
    measured = list(dict.fromkeys(one["precision"] for one in record["measurements"]))
    if not set(measured) <= set(
        manifest.precisions
    ):  # they become a file name, and a board is another's word
        raise DeviceError(
            f"the record is of {', '.join(measured)}, which the bundle does not hold", where=where
        )
    mode = (record["device"].get("power_mode") or {}).get("name")
    file = directory.bench_file(
        # The same board in another power mode is another measurement.
        " ".join(filter(None, [record["device"]["name"], mode])),
        runtime="trtexec" if runtime == "trtexec" else record["runtime"].split()[0],
        precisions=measured,
        threads=record["threads"],
        batch=record["batch"],
    )
    write_json(file, record)
    return record
