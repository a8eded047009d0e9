"""Run the device code in a process of its own on this machine, and take its answer, from here or from a board."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import edgecl
from edgecl.errors import ArtifactError, DeviceError, EdgeclError, ParityError
from edgecl.onboard import errors as onboard_errors
from edgecl.onboard.bench import PROGRESS
from edgecl.onboard.errors import OnboardError
from edgecl.onboard.remote import pinned

Report = Callable[[str], None]

# The device code, started where edgecl lies, so that neither the caller's directory nor an editable
# install decides which edgecl is measured with.
_ONBOARD = [sys.executable, "-m", "edgecl.onboard"]
_HOME = Path(edgecl.__file__).parent.parent
_LAST_WORDS = 20

_ERRORS: dict[str, type[EdgeclError]] = {
    onboard_errors.BundleError.name: ArtifactError,
    onboard_errors.DisagreementError.name: ParityError,
    onboard_errors.DeviceError.name: DeviceError,
}


class Listener:
    """Takes what the device code says on stderr: progress is passed on, the last other lines are kept."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self.words: deque[str] = deque(maxlen=_LAST_WORDS)

    def hear(self, lines: Iterable[str]) -> None:
        """Take some lines; what could move a terminal's cursor is taken out of them."""
        for line in ("".join(filter(str.isprintable, line.rstrip())) for line in lines):
            if not line.startswith(PROGRESS):
                self.words.append(line)
            elif self._report:
                self._report(line[len(PROGRESS) :])


def run_here(verb: Sequence[str], *, threads: int, report: Report | None) -> dict[str, Any]:
    """Run a verb of the device code in a process of its own and return its JSON object.

    Args:
        verb: what would follow `python3 onboard.pyz`.
        threads: how many its libraries shall compute with.
        report: called with each line of progress.

    Raises:
        OnboardError: what the device code itself complains of.
        DeviceError: it ended without an answer.
    """
    listener = Listener(report)
    with tempfile.TemporaryFile() as answer:
        with subprocess.Popen(
            [*_ONBOARD, *verb],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            cwd=_HOME,
            env=pinned(threads),
        ) as process:
            try:
                assert process.stderr is not None
                listener.hear(process.stderr)
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


def record_of(
    status: int | None, record: object, words: Iterable[str], *, where: Mapping[str, object]
) -> dict[str, Any]:
    """Return the record of a process that ended, or raise what became of it.

    Args:
        status: its exit status, negative for a signal, None where nobody saw it end.
        record: the JSON it gave, if any.
        words: its last words.
        where: of the error, label -> place.

    Raises:
        OnboardError: the JSON is an error of the device code.
        DeviceError: there is no record.
    """
    if status is None or status < 0:
        by = "with everything around it" if status is None else f"by {_signal_name(-status)}"
        raise DeviceError(
            f"the measuring process was killed {by}",
            where=where,
            hint="SIGKILL often means that memory ran out (see `dmesg`); close other programs and try again"
            if status is None or -status == signal.SIGKILL
            else "try again; if it happens again, try another version of the runtime",
        )
    if isinstance(record, dict) and isinstance(record.get("error"), dict):
        raise _onboard_error(record["error"])
    if not isinstance(record, dict) or status not in (0, 1):
        raise DeviceError(
            f"the measuring process ended with exit status {status} and no record",
            where={**where, "it said": " | ".join(filter(None, words)) or "nothing"},
        )
    return record


def _onboard_error(error: dict[str, Any]) -> OnboardError:
    problem, hint = str(error.get("problem")), error.get("hint")
    if error.get("name") == onboard_errors.DisagreementError.name:
        return onboard_errors.DisagreementError(problem, hint, error.get("record"))
    if error.get("name") == onboard_errors.BundleError.name:
        return onboard_errors.BundleError(problem, hint)
    return onboard_errors.DeviceError(problem, hint)


def error_from_onboard(error: OnboardError, *, where: Mapping[str, object]) -> EdgeclError:
    """Return the host's error for one of the device code's, with the same text."""
    return _ERRORS.get(error.name, EdgeclError)(error.problem, where=where, hint=error.hint)


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} ({number})"
    except ValueError:
        return f"signal {number}"
