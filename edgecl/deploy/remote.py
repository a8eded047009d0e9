"""Run the device code on a board over the system's OpenSSH: copy a bundle there, start, follow, bring the record back.

The far side of ssh is always a shell. So what it is sent as a command is one of three fixed texts, in which only the
run's name varies, which the board's mktemp chose and a pattern here checks; everything a user wrote travels
as JSON or as bytes over stdin to `edgecl.onboard.remote`. The host key must be known, and nothing ever asks: what ssh
would have asked is an error that says so. Everything else, such as names, keys and jump hosts, is ssh's own
configuration; the environment variable EDGECL_SSH_OPTIONS adds arguments to every call.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from edgecl.deploy.onboard_zip import onboard_bytes
from edgecl.deploy.process import BUILDING_SILENCE_S, Listener, record_of
from edgecl.errors import DeviceError
from edgecl.onboard.bundle import MANIFEST, check_files, read_manifest, sha256_of_file
from edgecl.onboard.remote import MARK
from edgecl.onboard.runtime import Report

SSH_OPTIONS = "EDGECL_SSH_OPTIONS"
"""Environment variable: more arguments for ssh, split as a shell would, such as '-F FILE' or '-i KEY'."""

_USER = r"[A-Za-z_][A-Za-z0-9_.-]*"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_IPV6 = r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?:%[A-Za-z0-9._-]+)?"
_HOST = re.compile(
    rf"(?:(?P<user>{_USER})@)?(?:(?P<name>{_NAME})|\[(?P<ipv6>{_IPV6})\])(?::(?P<port>\d{{1,5}}))?"
)

_RUN_NAME = re.compile(r"run\.[A-Za-z0-9]{8,}")

# The first value of an option wins in ssh, so these stand before the user's own.
_OPTIONS = (
    "BatchMode=yes StrictHostKeyChecking=yes ConnectTimeout=15 ServerAliveInterval=5 ServerAliveCountMax=3 LogLevel=INFO "
    "ForwardAgent=no ForwardX11=no ClearAllForwardings=yes PermitLocalCommand=no RemoteCommand=none"
)
_OURS = ["-T", *(word for option in _OPTIONS.split() for word in ("-o", option))]

# In single quotes for whatever shell the account has: no quote, newline or exclamation mark within.
_INSTALL = (
    "sh -c '"
    'command -v python3 >/dev/null 2>&1 || { echo "@edgecl {\\"lacks\\": \\"python3\\"}"; exit 0; }; '
    'umask 077; mkdir -p "$HOME/.cache/edgecl" && cd "$HOME/.cache/edgecl" && '
    "run=$(mktemp -d run.XXXXXXXX) && "
    'if cat >"$run/onboard.pyz"; then echo "@edgecl {\\"run\\": \\"$run\\"}"; else rm -r "$run"; exit 1; fi'
    "'"
)
# -S: this end needs the standard library only, and starts sooner without looking for more.
_GO = 'python3 -S "$HOME/.cache/edgecl/{run}/onboard.pyz" remote go'
_END = 'python3 -S "$HOME/.cache/edgecl/{run}/onboard.pyz" remote end'

# What a part of ssh's words means, where a second try mends nothing.
_REFUSALS = {
    "IDENTIFICATION HAS CHANGED": (
        "the host key of '{host}' is not the one that ssh knows: another machine may pose as the board",
        "if the board was set up anew, remove the old key as ssh says in `{login}`, and connect once",
    ),
    "host key is known for|Host key verification failed": (
        "the host key of '{host}' is unknown to ssh",
        "run `{login}` once and compare the key's fingerprint with the board's",
    ),
    "Permission denied|Too many authentication failures": (
        "'{host}' does not let you in without a password",
        "see that the user is right, and copy your key there with `{copy_id}`",
    ),
    "command-line|[Bb]ad configuration option|no argument after keyword|Can't open user config": (
        "ssh does not take its options",
        None,
    ),
}
_HINTS = {
    "Could not resolve hostname": "no machine of that name: check it, or give the board's address",
    "Connection refused": "the board is up but no ssh server listens there: check the port, and on the board "
    "`sudo systemctl enable --now ssh`",
    "No route to host": "check that the board is on, and its network",
    "Network is unreachable": "check this machine's network",
    "timed out": "check that the board is on, its address, and firewalls between",
}

# A board says something every two seconds.
_SILENCE_S = 60.0
_PATIENCE_S = 120.0
_PAUSES_S = (1.0, 2.0, 4.0, 8.0)
_BLOCK = 1 << 20

_Result = TypeVar("_Result")


class _LostConnectionError(Exception):
    """A connection that ended early, for a reason that may pass."""


class _GoneError(DeviceError):
    """A board that was there and did not come back."""


def run_on_board(
    host: str,
    verb: str,
    arguments: Sequence[str],
    *,
    bundle: Path | None,
    target: dict[str, Any] | None = None,
    threads: int | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Run a verb of the device code on a board and return its record.

    The run there does not depend on the connection: when that drops, it is made again and the run picked up.
    A bundle's files stay on the board, in ~/.cache/edgecl, and those that are there already are not sent again.

    Args:
        host: USER@BOARD[:PORT]; USER may be left to ssh's configuration, an IPv6 address stands in brackets.
        arguments: of the verb, without the bundle.
        target: for a doctor without a bundle.
        threads: how many its libraries shall compute with; every core of the board where None.

    Raises:
        OnboardError: an error of the device code on the board, or a bundle that is not whole here.
        DeviceError: the board cannot be reached, refuses, lacks something, or the run died there or hangs.
    """
    user, name, port = _address(host)
    request: dict[str, Any] = {
        "verb": verb,
        "arguments": list(arguments),
        "threads": threads,
        "target": target,
    }
    request.update(bundle=None, files=[], offset=0)
    if bundle is not None:
        files = _files_of(bundle)
        manifest = next(entry for entry in files if entry["name"] == MANIFEST)
        request.update(bundle=f"bundle-{manifest['sha256'][:12]}", files=files)
    ssh = [*_OURS, *_options_of_environment()]
    ssh += [*(["-l", user] if user else []), *(["-p", port] if port else []), "--", name]
    login = " ".join(["ssh", *(["-p", port] if port else []), f"{user}@{name}" if user else name])
    board = _Board(host, ssh, login=login, report=report)
    run = board.insist(board.install)
    listener = Listener(report, limit_s=BUILDING_SILENCE_S)
    try:
        status, record = board.insist(lambda: board.go(run, request, bundle, listener))
    except _GoneError:
        raise
    except BaseException:  # Ctrl-C too
        board.end(run)
        raise
    return record_of(status, record, listener.words, where={"board": host})


def _address(host: str) -> tuple[str | None, str, str | None]:
    """Return user, name and port of a host that someone named."""
    found = _HOST.fullmatch(host)
    if not found or (found["port"] and not 1 <= int(found["port"]) <= 65535):
        raise DeviceError(
            f"--host {host!r} is not of the form USER@BOARD[:PORT]",
            hint="letters, digits, '.', '-' and '_' only, as in nano@192.168.55.1 or me@orin.local:2222; "
            "an IPv6 address stands in brackets, as in me@[fe80::1]:22",
        )
    return found["user"], found["name"] or found["ipv6"], found["port"]


def _options_of_environment() -> list[str]:
    text = os.environ.get(SSH_OPTIONS, "")
    try:
        return shlex.split(text)
    except ValueError as exc:
        raise DeviceError(f"cannot split {SSH_OPTIONS}={text!r} into words: {exc}") from exc


def _files_of(bundle: Path) -> list[dict[str, Any]]:
    """Return name, size and hash of what is copied: the manifest and the files it names, once they are whole."""
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    hashes = {MANIFEST: sha256_of_file(bundle / MANIFEST), **manifest["files"]}
    return [
        {"name": name, "size": (bundle / name).stat().st_size, "sha256": digest}
        for name, digest in sorted(hashes.items())
    ]


class _Board:
    """A board under an address, and the three things asked of it."""

    def __init__(self, host: str, ssh: list[str], *, login: str, report: Report | None) -> None:
        self._host = host
        self._ssh = ssh
        self._login = login
        self._report = report or (lambda line: None)
        self.heard_at: float | None = None
        """When the board spoke last; once it did, a lost connection is sought again."""

    def insist(self, step: Callable[[], _Result]) -> _Result:
        """Do a step again, after growing pauses, as long as the connection gets lost; it must be one that goes on."""
        tries = 0
        while True:
            started_at = time.monotonic()
            try:
                return step()
            except _LostConnectionError as lost:
                if self.heard_at is None:
                    hints = (hint for said, hint in _HINTS.items() if said in str(lost))
                    hint = next(hints, f"try `{self._login}` yourself")
                    raise DeviceError(f"cannot connect to '{self._host}': {lost}", hint=hint) from lost
                if time.monotonic() - self.heard_at > _PATIENCE_S:
                    raise _GoneError(
                        f"the connection to '{self._host}' was lost and did not come back within "
                        f"{_PATIENCE_S:g} s",
                        where={"ssh said": str(lost)},
                        hint="the run goes on there and ends by itself, nothing was written here; see that the "
                        "board is up and reachable, then run this again",
                    ) from lost
                self._report(f"connection to {self._host} lost, trying again: {lost}")
                tries = 0 if self.heard_at > started_at else tries + 1
                time.sleep(min(_PAUSES_S[min(tries, len(_PAUSES_S) - 1)], _PATIENCE_S))

    def install(self) -> str:
        """Copy the device code into a new directory on the board and return that directory's name."""
        with _Connection(self, _INSTALL) as connection:
            connection.send(onboard_bytes())
            connection.finish_sending()
            answer = connection.hear()
        if "lacks" in answer:
            raise self._without_python()
        if not _RUN_NAME.fullmatch(str(answer.get("run"))):
            raise DeviceError(f"'{self._host}' answers what nobody asked: {answer}")
        return str(answer["run"])

    def go(
        self, run: str, request: dict[str, Any], bundle: Path | None, listener: Listener
    ) -> tuple[int | None, dict[str, Any] | None]:
        """Bring a run to its end, from wherever it stands, and return its exit status and JSON."""
        with _Connection(self, _GO.format(run=run)) as connection:
            connection.send(json.dumps(request).encode() + b"\n")
            while True:
                answer = connection.hear()
                if "refused" in answer:
                    raise DeviceError(
                        answer["refused"]["problem"],
                        where={"board": self._host},
                        hint=answer["refused"]["hint"],
                    )
                if answer.get("need") and bundle is not None:
                    self._send_files(connection, request["files"], answer["need"], bundle)
                elif "log" in answer:
                    request["offset"] = answer["offset"]
                    listener.hear(answer["log"])
                elif "alive" in answer:
                    listener.left_s()
                elif "status" in answer:
                    with contextlib.suppress(_LostConnectionError, DeviceError):  # what matters is here
                        connection.send(b"end\n")
                        connection.hear()
                    return answer["status"], answer["record"]

    def _send_files(
        self, connection: _Connection, files: list[dict[str, Any]], need: list[str], bundle: Path
    ) -> None:
        lacking = [entry for entry in files if entry["name"] in need]
        mib = sum(entry["size"] for entry in lacking) / 2**20
        self._report(f"copying {len(lacking)} of {len(files)} files to {self._host}, {mib:.1f} MiB")
        for entry in lacking:
            with (bundle / entry["name"]).open("rb") as file:
                for block in iter(lambda file=file: file.read(_BLOCK), b""):  # type: ignore[misc]
                    connection.send(block)

    def end(self, run: str) -> None:
        """Stop the run and remove its files on the board; a board that is gone keeps them until a later run."""
        with (
            contextlib.suppress(_LostConnectionError, DeviceError, OSError),
            _Connection(self, _END.format(run=run)) as connection,
        ):
            connection.finish_sending()
            connection.hear(patience_s=15.0)

    def start(self, command: str, errors: Any) -> subprocess.Popen[bytes]:
        """Start ssh with one of the fixed commands."""
        try:
            # Not in the terminal's group: Ctrl-C is for edgecl, which then ends the run on the board.
            return subprocess.Popen(
                ["ssh", *self._ssh, command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        except FileNotFoundError as exc:
            raise DeviceError(
                "the program 'ssh' is not on the PATH", hint="sudo apt install openssh-client"
            ) from exc

    def failure(self, status: int | None, words: str) -> Exception:
        """Return what an ssh that ended early means."""
        last = words.strip().splitlines()[-1:] or [""]
        if status == 255:
            return self._refusal(words) or _LostConnectionError(last[0] or "the connection ended")
        if status is not None and status < 0:
            return _LostConnectionError(f"ssh was killed by signal {-status}")
        if status == 127 and "python3" in words:
            return self._without_python()
        if "No space left on device" in words or "Disk quota exceeded" in words:
            return DeviceError(
                f"no room on the disk of '{self._host}'",
                hint="free some space there; ~/.cache/edgecl holds the bundles of earlier runs and may be removed",
            )
        if status == 0:
            return _LostConnectionError("the board stopped talking")
        return DeviceError(
            f"the board '{self._host}' could not do its part: exit status {status}",
            where={"it said": " | ".join(words.strip().splitlines()[-5:]) or "nothing"},
        )

    def _without_python(self) -> DeviceError:
        return DeviceError(
            f"there is no python3 on '{self._host}'",
            hint="on the board: sudo apt install python3 python3-numpy",
        )

    def _refusal(self, words: str) -> DeviceError | None:
        """Return the error for what no second try would mend."""
        names = {
            "host": self._host,
            "login": self._login,
            "copy_id": self._login.replace("ssh", "ssh-copy-id", 1),
        }
        for said, (problem, hint) in _REFUSALS.items():
            if re.search(said, words):
                last = words.strip().splitlines()[-1]
                return DeviceError(
                    problem.format(**names), where={"ssh said": last}, hint=hint and hint.format(**names)
                )
        return None


class _Connection:
    """One ssh process: bytes to the board's stdin, marked JSON lines from its stdout."""

    def __init__(self, board: _Board, command: str) -> None:
        self._board = board
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed by __exit__
        try:
            self._process = board.start(command, self._errors)
        except BaseException:
            self._errors.close()
            raise
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._into, self._out = self._process.stdin, self._process.stdout
        self._text = b""

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._into.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._out.close()
        self._errors.close()

    def send(self, content: bytes) -> None:
        """Send bytes."""
        # What the board said before it hung up explains more than a broken pipe: the next hear() tells.
        with contextlib.suppress(BrokenPipeError):
            self._into.write(content)
            self._into.flush()

    def finish_sending(self) -> None:
        """Close the board's standard input."""
        with contextlib.suppress(BrokenPipeError):
            self._into.close()

    def hear(self, *, patience_s: float = _SILENCE_S) -> dict[str, Any]:
        """Return the next message of the board.

        Raises:
            _LostConnectionError: the connection ended or fell silent.
            DeviceError: it ended for a reason that will not pass.
        """
        while True:
            line, newline, rest = self._text.partition(b"\n")
            if newline:
                self._text = rest
                message = _message(line)
                if message is not None:
                    self._board.heard_at = time.monotonic()
                    return message
                continue
            if not select.select([self._out], [], [], patience_s)[0]:
                raise _LostConnectionError(f"the board said nothing for {patience_s:g} s")
            block = os.read(self._out.fileno(), 1 << 16)
            if not block:
                raise self._end()
            self._text += block

    def _end(self) -> Exception:
        try:
            status: int | None = self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            status = None
        self._errors.seek(0)
        return self._board.failure(status, self._errors.read().decode("utf-8", "replace"))


def _message(line: bytes) -> dict[str, Any] | None:
    """Return what a line tells, or None for what a login script printed."""
    text = line.decode("utf-8", "replace").strip("\r")
    if not text.startswith(MARK):
        return None
    try:
        message = json.loads(text[len(MARK) :])
    except json.JSONDecodeError:
        return None
    return message if isinstance(message, dict) else None
