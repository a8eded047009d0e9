"""Run the device code in a process of its own on this machine, and take its answer, from here or from a board."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import edgecl
from edgecl.errors import ArtifactError, DataError, DeviceError, EdgeclError, ParityError
from edgecl.onboard import errors as onboard_errors
from edgecl.onboard.bench import PROGRESS
from edgecl.onboard.errors import OnboardError
from edgecl.onboard.remote import pinned
from edgecl.onboard.runtime import Report
from edgecl.onboard.runtimes import RUNTIMES, full_name
from edgecl.onboard.trtexec import BUILD_LIMIT_S

# The device code, started where edgecl lies, so that neither the caller's directory nor an editable
# install decides which edgecl is measured with.
_ONBOARD = [sys.executable, "-m", "edgecl.onboard"]
_HOME = Path(edgecl.__file__).parent.parent
_LAST_WORDS = 20
_LONGEST_LINE = 1 << 16

# A net that loops for ever says nothing. Longer than a processor needs for the reference images, and than trtexec, which has
# a limit of its own, is given to build an engine.
SILENCE_S = 600.0
BUILDING_SILENCE_S = BUILD_LIMIT_S + SILENCE_S

_ERRORS: dict[type[OnboardError], type[EdgeclError]] = {
    onboard_errors.BundleError: ArtifactError,
    onboard_errors.DisagreementError: ParityError,
    onboard_errors.DataError: DataError,
    onboard_errors.DeviceError: DeviceError,
}
_NAMED = {kind.name: kind for kind in _ERRORS}


class Listener:
    """Takes what the device code says on stderr: progress is passed on, the last other lines are kept."""

    def __init__(self, report: Report | None, *, limit_s: float) -> None:
        self._report = report
        self._limit_s = limit_s
        self._heard_s = time.monotonic()
        self.words: deque[str] = deque(maxlen=_LAST_WORDS)

    def left_s(self) -> float:
        """Return for how many seconds the device code may still be silent; for none is a DeviceError."""
        left = self._heard_s + self._limit_s - time.monotonic()
        if left <= 0:
            raise DeviceError(
                f"the net's process said nothing for {self._limit_s:g} s",
                hint="its net may loop for ever: do not use a bundle that a stranger made",
            )
        return left

    def hear(self, lines: Iterable[str]) -> None:
        """Take some lines; what could move a terminal's cursor is taken out of them."""
        self._heard_s = time.monotonic()
        for line in ("".join(filter(str.isprintable, line.rstrip())) for line in lines):
            if not line.startswith(PROGRESS):
                self.words.append(line)
            elif self._report:
                self._report(line[len(PROGRESS) :])


def silence_s(runtime: str) -> float:
    """Return for how many seconds the device code may be silent; building an engine takes minutes."""
    record = RUNTIMES.get(full_name(runtime))
    return SILENCE_S if record is not None and not record.builds_engines else BUILDING_SILENCE_S


def run_here(
    verb: Sequence[str], *, threads: int, limit_s: float = SILENCE_S, report: Report | None
) -> dict[str, Any]:
    """Run a verb of the device code, as it would follow `python3 onboard.pyz`, in a process of its own; return its JSON.

    The process ends with the call, whatever ends that: a record, an error, Ctrl-C or the limit.

    Raises:
        OnboardError: an error of the device code.
        DeviceError: it ended without an answer, or was silent for too long.
    """
    listener = Listener(report, limit_s=limit_s)
    with tempfile.TemporaryFile() as answer:
        with subprocess.Popen(
            [*_ONBOARD, *verb],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=subprocess.PIPE,
            cwd=_HOME,
            env=pinned(threads),
        ) as process:
            try:
                assert process.stderr is not None
                _hear_out(process.stderr, listener)
                status = process.wait()
            except BaseException:
                process.kill()
                raise
        answer.seek(0)
        text = answer.read().decode("utf-8", "replace")
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        record = None
    return record_of(status, record, listener.words, where={})


def _hear_out(pipe: IO[bytes], listener: Listener) -> None:
    """Pass on what a process says, line by line, until it closes the pipe."""
    rest = b""
    while True:
        if not select.select([pipe], [], [], listener.left_s())[0]:
            continue
        block = os.read(pipe.fileno(), 1 << 16)
        *lines, rest = (rest + block).split(b"\n")
        if not block and rest:
            lines = [rest]
        listener.hear(line.decode("utf-8", "replace") for line in lines)
        if not block:
            return
        rest = rest[-_LONGEST_LINE:]


def record_of(
    status: int | None, record: object, words: Iterable[str], *, where: Mapping[str, object]
) -> dict[str, Any]:
    """Return the record of a process; its status is negative for a signal, None where nobody saw it end.

    Raises:
        OnboardError: the JSON is an error of the device code.
        DeviceError: there is no record.
    """
    if status is None or status < 0:
        by = "with everything around it" if status is None else f"by {_signal_name(-status)}"
        raise DeviceError(
            f"the net's process was killed {by}",
            where=where,
            hint="SIGKILL often means that memory ran out (see `dmesg`); close other programs and try again"
            if status is None or -status == signal.SIGKILL
            else "try again; if it happens again, try another version of the runtime",
        )
    if isinstance(record, dict) and isinstance(record.get("error"), dict):
        raise _onboard_error(record["error"])
    if not isinstance(record, dict) or status not in (0, 1):
        raise DeviceError(
            f"the net's process ended with exit status {status} and no record",
            where={**where, "it said": " | ".join(filter(None, words)) or "nothing"},
        )
    return record


def _onboard_error(error: dict[str, Any]) -> OnboardError:
    kind = _NAMED.get(str(error.get("name")), onboard_errors.DeviceError)
    found = kind(str(error.get("problem")), error.get("hint"))
    found.record = error.get("record")
    return found


def error_from_onboard(error: OnboardError, *, where: Mapping[str, object]) -> EdgeclError:
    """Return the host's error for one of the device code's, with the same text."""
    return _ERRORS.get(type(error), EdgeclError)(error.problem, where=where, hint=error.hint)


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} ({number})"
    except ValueError:
        return f"signal {number}"
