"""Hold a bundle to its hashes and reference outputs, on this machine or on a board over ssh."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgecl.deploy.process import error_from_onboard, run_here, silence_s
from edgecl.deploy.remote import run_on_board
from edgecl.errors import ArtifactError
from edgecl.onboard import errors as onboard_errors
from edgecl.onboard.bundle import choose_precision, read_manifest, sha256_of_file
from edgecl.onboard.device_info import available_cores
from edgecl.onboard.errors import OnboardError
from edgecl.storage.directories import Bundle
from edgecl.storage.raw_records import record_header
from edgecl.storage.writing import write_json


def verify(
    bundle: Path,
    *,
    precisions: Sequence[str] | None = None,
    runtime: str | None = None,
    host: str | None = None,
    ssh_options: Sequence[str] = (),
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Check a bundle's files and outputs with the code that runs on devices, and keep the decision beside it.

    The net runs in a process of its own: one that loops for ever, crashes or fills the memory takes only that along.

    Args:
        bundle: the directory; `verify.json` is written into it, for a failed check too, where that can be written.
        precisions: which to run; all that the bundle holds where None.
        runtime: to run them with; the bundle's own where None.
        host: USER@BOARD[:PORT] to verify on, by `edgecl.deploy.remote`; this machine where None.
        ssh_options: further arguments for `ssh`.
        report: called with a line on how far it is, and where the decision could not be kept.

    Returns:
        The record; see `edgecl.onboard.verify.verify` for its numbers.

    Raises:
        ArtifactError: not a bundle, or a file is missing or changed.
        ParityError: outputs further from torch's than the manifest allows.
        DeviceError: the runtime is not installed or cannot load the net, the net's process died or was silent for too
            long, or the board cannot be reached or used.
    """
    directory = Bundle(bundle)
    directory.read()
    header = record_header("verify", made_from=sha256_of_file(directory.record_file))
    try:
        held = read_manifest(bundle)  # by the device's rules, before anything is copied or started
        arguments = [] if runtime is None else ["--runtime", runtime]
        for precision in precisions or ():
            choose_precision(held, precision)
            arguments += ["--precision", precision]
        if host is None:
            found = run_here(
                ["verify", str(bundle.resolve()), *arguments],
                threads=available_cores(),
                limit_s=silence_s(runtime or held["runtime"]),
                report=report,
            )
        else:
            found = run_on_board(
                host, "verify", arguments, bundle=bundle, ssh_options=ssh_options, report=report
            )
    except OnboardError as error:
        if error.name != onboard_errors.DeviceError.name:  # without a runtime there is no decision
            decision = {
                "ok": False,
                "files_ok": False,
                **getattr(error, "record", {}),
                "problem": error.problem,
            }
            with contextlib.suppress(ArtifactError):  # the decision matters more than its record
                write_json(directory.verify_file, {**header, **decision})
        where = {"bundle": bundle} if host is None else {"bundle": bundle, "board": host}
        raise error_from_onboard(error, where=where) from error
    record = {**header, **found}
    try:
        write_json(directory.verify_file, record)
    except ArtifactError as error:  # the bundle may lie on a read-only place, and the check has passed
        if report:
            report(f"the decision is not kept: {error.problem}")
    return record
