"""The board's end of `edgecl ... --host`: take a bundle's files, run a verb apart from the connection, report on it.

The host starts `python3 RUN/onboard.pyz remote go` over ssh and speaks first, one JSON line: what to run, and the
name, size and hash of each file. The board answers which files it lacks, takes them as bare bytes in that order,
starts the run in a session of its own, and then tells of its log until there is a record. The same request again,
after a dropped connection, goes on where things stand. On the board there are

    ~/.cache/edgecl/bundle-SHA/     a bundle's files, and the engines built from them; SHA is its manifest's hash
    ~/.cache/edgecl/run.XXXXXXXX/   one run: onboard.pyz, log, record; removed by `remote end`
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Optional, TextIO

from .bundle import sha256_of_file, write_whole
from .device_info import available_cores
from .errors import DeviceError

MARK = "@edgecl "
"""Begins every line that is meant for the host: what a login script prints has no such mark."""

BUNDLE_NAME = re.compile(r"bundle-[0-9a-f]{12}")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")

# Files of one run.
_LOCK, _STARTED, _STATUS = "lock", "started", "status"
_RECORD, _LOG, _TARGET = "record.json", "log", "target.json"

_POLL_S = 0.25
_ALIVE_EVERY_S = 2.0
_BLOCK = 1 << 20
# A run that was never fetched is removed by a later one.
_OLD_RUN_S = 7 * 86400.0
# Left free on the disk beside the files, for the log and the record.
_SPARE_BYTES = 16 << 20


def pinned(threads: int) -> Dict[str, str]:
    """Return the environment of a process that computes with a number of threads."""
    count = str(threads)
    return dict(os.environ, OMP_NUM_THREADS=count, MKL_NUM_THREADS=count, OPENBLAS_NUM_THREADS="1")


def serve(arguments: List[str]) -> int:
    """Do one of `go`, `supervise` and `end`, in the directory that holds the running onboard.pyz."""
    run = Path(sys.argv[0]).resolve().parent
    try:
        if arguments == ["go"]:
            return go(run, sys.stdin.buffer, sys.stdout)
        if arguments == ["supervise"]:
            return supervise(run)
        if arguments == ["end"]:
            return end(run, sys.stdout)
    except BrokenPipeError:  # the connection is gone; the host asks again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    sys.stderr.write("edgecl: `remote` is for `edgecl --host` only\n")
    return 2


def go(run: Path, source: BinaryIO, told: TextIO) -> int:
    """Take the missing files, start the run unless it was started, and report on it until it ends.

    What the host says comes from `source`: a line of JSON, then files. 1 is for a request this board refuses.
    """
    try:
        request = json.loads(source.readline().decode("utf-8"))
        if not (run / _STARTED).exists():
            bundle = _take_bundle(run.parent, request, source, told)
            _start(run, bundle, request)
    except DeviceError as refusal:
        _tell(told, {"refused": {"problem": refusal.problem, "hint": refusal.hint}})
        return 1
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = "no room on the board's disk" if full else "the board cannot write: %s" % exc
        hint = "free some space in %s" % run.parent if full else None
        _tell(told, {"refused": {"problem": problem, "hint": hint}})
        return 1
    except ValueError:  # a line cut short: the connection is gone
        return 1
    _follow(run, int(request.get("offset", 0)), told)
    if source.readline() == b"end\n":  # the host has it
        return end(run, told)
    return 0


def _take_bundle(cache: Path, request: Dict[str, Any], source: BinaryIO, told: TextIO) -> Optional[Path]:
    """Take the files that differ from those of an earlier run, and return the bundle's directory."""
    if request["bundle"] is None:
        _tell(told, {"need": []})
        return None
    files: List[Dict[str, Any]] = request["files"]
    # The host checks these names too; a board takes no one's word for where it writes.
    if not BUNDLE_NAME.fullmatch(request["bundle"]) or not all(
        FILE_NAME.fullmatch(entry["name"]) for entry in files
    ):
        raise DeviceError("the board does not take files of such names")
    bundle = cache / str(request["bundle"])
    bundle.mkdir(exist_ok=True)
    for part in bundle.glob(".*.part"):
        if time.time() - part.stat().st_mtime > 3600:
            part.unlink()
    need = [
        entry
        for entry in files
        if not (bundle / entry["name"]).is_file() or sha256_of_file(bundle / entry["name"]) != entry["sha256"]
    ]
    free, wanted = shutil.disk_usage(str(cache)).free, sum(entry["size"] for entry in need) + _SPARE_BYTES
    if free < wanted:
        raise DeviceError(
            "no room on the board's disk: the bundle needs %.0f MiB, %.0f MiB are free"
            % (wanted / 2.0**20, free / 2.0**20),
            "free some space there; %s holds the bundles of earlier runs and may be removed" % cache,
        )
    _tell(told, {"need": [entry["name"] for entry in need]})
    for entry in need:
        _take_file(bundle, entry, source)
    return bundle


def _take_file(bundle: Path, entry: Dict[str, Any], source: BinaryIO) -> None:
    aside = bundle / (".%s.%d.part" % (entry["name"], os.getpid()))
    digest, left = hashlib.sha256(), entry["size"]
    try:
        with aside.open("wb") as file:
            while left:
                block = source.read(min(left, _BLOCK))
                if not block:
                    raise ValueError("the connection ended within a file")
                digest.update(block)
                file.write(block)
                left -= len(block)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != entry["sha256"]:
            raise DeviceError("'%s' arrived changed: its hash is another" % entry["name"], "try again")
        aside.replace(bundle / entry["name"])
    finally:
        if aside.exists():
            aside.unlink()


def _start(run: Path, bundle: Optional[Path], request: Dict[str, Any]) -> None:
    """Start the run in a session of its own, so that it outlives the connection; once only."""
    with (run / _LOCK).open("w") as lock:
        if not _locked(lock) or (run / _STARTED).exists():
            return  # by an earlier connection, which this board has not seen die yet
        _sweep(run.parent)
        command = [sys.executable, str(run / "onboard.pyz"), request["verb"]]
        command += [] if bundle is None else [str(bundle)]
        if request.get("target") is not None:
            (run / _TARGET).write_text(json.dumps(request["target"]))
            command += ["--target", str(run / _TARGET)]
        command += list(request["arguments"]) + ["--out", str(run / _RECORD)]
        (run / "command").write_text(json.dumps({"command": command, "threads": request.get("threads")}))
        with (run / _LOG).open("wb") as log:
            subprocess.Popen(
                [sys.executable, "-S", str(run / "onboard.pyz"), "remote", "supervise"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=str(run),
                start_new_session=True,
                pass_fds=(lock.fileno(),),  # held as long as the supervisor lives
            )


def _locked(file: TextIO) -> bool:
    """Take the lock of a run, or return False where its supervisor lives and holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _alive(run: Path) -> bool:
    with (run / _LOCK).open("a") as lock:
        return not _locked(lock)


def _sweep(cache: Path) -> None:
    """Remove what runs left whose host never came back."""
    for old in cache.glob("run.*"):
        if time.time() - old.stat().st_mtime > _OLD_RUN_S and not ((old / _LOCK).exists() and _alive(old)):
            shutil.rmtree(str(old), ignore_errors=True)


def supervise(run: Path) -> int:
    """Run the verb, and keep how it ended."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    write_whole(run / _STARTED, b"%d" % os.getpid())
    asked = json.loads((run / "command").read_text())
    threads = asked["threads"] or available_cores()
    try:
        status = subprocess.call(asked["command"], env=pinned(threads), stdin=subprocess.DEVNULL)
    except OSError as exc:
        sys.stderr.write("%s\n" % exc)
        status = 127
    write_whole(run / _STATUS, b"%d" % status)
    return 0


def _follow(run: Path, offset: int, told: TextIO) -> None:
    """Send the log from an offset on, and at last the exit status, with the record where there is one."""
    heard = 0.0
    while True:
        ended = (run / _STATUS).exists()
        dead = not ended and not _alive(run)
        ended = ended or (dead and (run / _STATUS).exists())  # it ended between the two looks
        with (run / _LOG).open("rb") as log:
            log.seek(offset)
            lines, separator, _ = log.read().rpartition(b"\n")
        if separator:
            offset += len(lines) + 1
            _tell(told, {"log": lines.decode("utf-8", "replace").split("\n"), "offset": offset})
            heard = time.monotonic()
        if ended or dead:
            record = None
            if ended and (run / _RECORD).exists():
                record = json.loads((run / _RECORD).read_text())
            status = int((run / _STATUS).read_text()) if ended else None
            _tell(told, {"status": status, "record": record})
            return
        if time.monotonic() - heard > _ALIVE_EVERY_S:
            _tell(told, {"alive": True})  # a connection that is gone is noticed here
            heard = time.monotonic()
        time.sleep(_POLL_S)


def end(run: Path, told: TextIO) -> int:
    """Stop the run if it still goes on, and remove its directory."""
    started, asked = run / _STARTED, time.monotonic()
    while _alive(run) and not started.exists() and time.monotonic() - asked < 5.0:
        time.sleep(0.05)  # the supervisor is just being started
    if started.exists() and _alive(run):
        pid = int(started.read_text())
        for number, patience_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                break
            waited = time.monotonic()
            while _alive(run) and time.monotonic() - waited < patience_s:
                time.sleep(0.05)
            if not _alive(run):
                break
    shutil.rmtree(str(run), ignore_errors=True)
    _tell(told, {"ended": not run.exists()})
    return 0


def _tell(told: TextIO, message: Dict[str, Any]) -> None:
    told.write(MARK + json.dumps(message) + "\n")
    told.flush()
