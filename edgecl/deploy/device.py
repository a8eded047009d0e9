"""The verbs that run on a device, verify, bench and doctor: in a process of its own here, or on a board over ssh."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from edgecl.config.target import read_target
from edgecl.deploy.process import error_from_onboard, run_here, silence_s
from edgecl.deploy.remote import run_on_board
from edgecl.errors import ArtifactError, DeviceError, first_line
from edgecl.onboard import errors as onboard_errors
from edgecl.onboard.bundle import choose_precision, read_manifest, sha256_of_file
from edgecl.onboard.device_info import available_cores
from edgecl.onboard.errors import OnboardError
from edgecl.onboard.runtime import Report
from edgecl.onboard.runtimes import TRTEXEC
from edgecl.storage.directories import Bundle
from edgecl.storage.record_files import write_record
from edgecl.storage.records import (
    MADE_BY,
    SCHEMA,
    BenchRecord,
    DoctorCheck,
    DoctorReport,
    Json,
    RecordT,
    VerifyRecord,
    command_line,
    parse_record,
)


def verify(
    bundle: Path,
    *,
    precisions: Sequence[str] | None = None,
    runtime: str | None = None,
    host: str | None = None,
    report: Report | None = None,
) -> VerifyRecord:
    """Check a bundle with the code that runs on devices, and keep the result beside it, also of a failed check.

    The net runs in a process of its own: one that loops for ever, crashes or fills the memory takes only that along.
    `edgecl.verify` tells arguments, result and errors.
    """
    directory = Bundle(bundle)
    directory.read()
    made_from = sha256_of_file(directory.record_file)
    where = _where(bundle, host)
    try:
        found = _run("verify", bundle, precisions=precisions, runtime=runtime, host=host, report=report)
    except OnboardError as error:
        if error.name != onboard_errors.DeviceError.name:  # without a runtime nothing was found out
            seen = error.record or {}
            failed = {"ok": False, "files_ok": False, **seen, "problem": error.problem}
            with contextlib.suppress(ArtifactError):  # the error matters more than its record
                write_record(directory.verify_file, _record(VerifyRecord, made_from, failed))
        raise error_from_onboard(error, where=where) from error
    record = _record(VerifyRecord, made_from, found)
    try:
        write_record(directory.verify_file, record)
    except ArtifactError as error:  # the bundle may lie on a read-only place, and the check has passed
        if report:
            report(f"the result is not kept: {error.problem}")
    return record


def bench(
    bundle: Path,
    *,
    precisions: Sequence[str] | None = None,
    runtime: str | None = None,
    duration_s: float = 10.0,
    threads: int | None = None,
    power: bool = True,
    host: str | None = None,
    report: Report | None = None,
) -> BenchRecord:
    """Time the nets of a bundle and keep the record in it; see `edgecl.onboard.bundle.bench_name` for its name.

    The process that measures imports NumPy and the runtime, nothing else that is heavy, and runs one session, in
    which several precisions take turns. `edgecl.bench` tells arguments, result and errors; the record's
    `onboard_command` is what ran on the device.
    """
    directory = Bundle(bundle)
    manifest = directory.read()
    where = _where(bundle, host)
    if host is None and threads is None:
        threads = available_cores()
    more = ["--duration-s", repr(duration_s), *([] if power else ["--no-power"])]
    more += [] if threads is None else ["--threads", str(threads)]
    try:
        found = _run(
            "bench",
            bundle,
            more,
            precisions=precisions,
            runtime=runtime,
            threads=threads,
            host=host,
            report=report,
        )
    except OnboardError as error:
        raise error_from_onboard(error, where=where) from error
    # `command` is what one types again, `onboard_command` what it started where the net ran.
    found["onboard_command"] = found.pop("command", None)
    record = _record(BenchRecord, sha256_of_file(directory.record_file), found)
    measured = list(dict.fromkeys(one.precision for one in record.measurements))
    if not set(measured) <= set(manifest.precisions):
        raise DeviceError(
            f"the record is of {', '.join(measured)}, which the bundle does not hold", where=where
        )
    # The same board in another power mode is another measurement.
    mode = record.device.power_mode.name if record.device.power_mode else None
    file = directory.bench_file(
        " ".join(filter(None, [record.device.name, mode])),
        runtime=TRTEXEC if runtime == TRTEXEC else record.runtime.split()[0],
        precisions=measured,
        threads=record.threads,
        batch=record.batch,
    )
    return write_record(file, record)


def doctor(
    bundle: Path | None = None,
    *,
    target: str | None = None,
    host: str | None = None,
    report: Report | None = None,
) -> DoctorReport:
    """Check a device, this machine or USER@BOARD[:PORT], for a bundle, for the name or file of a target, or as such.

    Raises:
        TargetError: no such target, or one that cannot be read.
        ArtifactError: not a bundle, or for a board one that is not whole.
        DeviceError: the board cannot be reached or used.
    """
    from edgecl.onboard.doctor import doctor as doctor_onboard

    asked = None if target is None else read_target(target).model_dump(mode="json")
    if bundle is not None:
        Bundle(bundle).read()
    if host is None:
        found = doctor_onboard(bundle, target=asked)
    else:
        try:
            found = run_on_board(host, "doctor", [], bundle=bundle, target=asked, report=report)
        except OnboardError as error:
            raise error_from_onboard(error, where=_where(bundle, host)) from error
    try:
        record = DoctorReport.model_validate(found)
    except ValidationError as exc:
        raise DeviceError(
            "the device's answer is not what edgecl writes",
            where={**_where(bundle, host), "in": first_line(exc)},
        ) from None
    if host is None and bundle is None and target is None:
        record.checks.append(_check_ssh())
    return record


def _check_ssh() -> DoctorCheck:
    program = shutil.which("ssh")
    if program:
        return DoctorCheck(name="ssh", status="ok", found=program)
    fix = "sudo apt install openssh-client  # for --host"
    return DoctorCheck(name="ssh", status="warn", found="not on the PATH", fix=fix)


def _record(kind: type[RecordT], made_from: str, found: Json) -> RecordT:
    """Return what a device found as a record; a board's words are checked as a file's are."""
    own = {
        "schema": SCHEMA,
        "kind": kind.KIND,
        "made_by": MADE_BY,
        "made_from": made_from,
        "command": command_line(),
    }
    return parse_record({**found, **own}, kind, path=Path(kind.FILE))


def _run(
    verb: str,
    bundle: Path,
    more: Sequence[str] = (),
    *,
    precisions: Sequence[str] | None,
    runtime: str | None,
    host: str | None,
    report: Report | None,
    threads: int | None = None,
) -> Json:
    """Run a verb on a bundle where it was asked for; its manifest is checked before anything is copied or started."""
    manifest = read_manifest(bundle)
    arguments = [] if runtime is None else ["--runtime", runtime]
    for precision in precisions or ():
        choose_precision(manifest, precision)
        arguments += ["--precision", precision]
    arguments += more
    if host is None:
        return run_here(
            [verb, str(bundle.resolve()), *arguments],
            threads=threads or available_cores(),
            limit_s=silence_s(runtime or manifest["runtime"]),
            report=report,
        )
    return run_on_board(host, verb, arguments, bundle=bundle, threads=threads, report=report)


def _where(bundle: Path | None, host: str | None) -> Mapping[str, object]:
    return {name: value for name, value in (("bundle", bundle), ("board", host)) if value is not None}
