"""One writer per directory: a lock the kernel gives back when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgecl.errors import ArtifactError, tell
from edgecl.storage.records import command_line
from edgecl.storage.writing import remove_leftovers

NAME = ".lock"

# A holder writes its name right after it took the lock; how often and how long to wait for that.
_TRIES, _PAUSE_S = 20, 0.05
_LONGEST_CROWD = 1000
_HELD_ELSEWHERE = {errno.EAGAIN, errno.EACCES}
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

_held: set[int] = set()


def _close_in_child() -> None:
    """Give up a forked child's share of the locks: one that outlives its parent must not hold them on."""
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


# A program started with exec never gets the handles: Python opens files so.
os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def hold(directory: Path, *, what: str) -> Iterator[None]:
    """Hold a directory, made if it is missing, so that no other process writes into it.

    Directories that were made and stayed empty go again. The lock is an flock(2) on the file `.lock`, which names its
    holder and goes with a clean end. A process that is killed leaves the file, but not the lock. Where the file system
    knows no locks this is said on stderr, and the directory is not held. What a killed process left half written in the
    directory is removed.

    Args:
        directory: what to hold.
        what: what it is, for the error: 'run directory'.

    Raises:
        ArtifactError: another process holds it, or it cannot be written.
    """
    file = directory / NAME
    made: list[Path] = []
    with contextlib.suppress(OSError):
        made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        handle = _take(file, what)
        _held.add(handle)
        try:
            remove_leftovers(directory)
            yield
        finally:
            if handle in _held:  # not in a forked child
                # Unlinked while still held: who opened it before finds, once it gets the lock, that the name is gone.
                if _is_named(handle, file):
                    with contextlib.suppress(OSError):
                        file.unlink()
                _held.discard(handle)
                os.close(handle)
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()  # only an empty one, and then not those above


def _take(file: Path, what: str) -> int:
    """Open and lock the file under this name, and write the holder into it; return its handle."""
    unsigned = renamed = 0
    while True:
        handle = _open(file, what)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(handle, file):
                _sign(handle)
                return handle
            # Its last holder removed it between the two calls. No crowd of runs does so for ever.
            renamed += 1
            if renamed == _LONGEST_CROWD:
                _say_no_locks(file.parent, "files do not keep their numbers")
                return handle
        except OSError as exc:
            if exc.errno in _NO_LOCKS_HERE:
                _say_no_locks(file.parent, os.strerror(exc.errno or 0))
                return handle
            if exc.errno not in _HELD_ELSEWHERE:
                if _is_named(handle, file):
                    file.unlink(missing_ok=True)  # unsigned: the disk is full
                os.close(handle)
                raise _cannot_write(file, what, exc) from exc
            holder = _read_holder(handle)
            unsigned += 1
            if holder or unsigned == _TRIES:
                os.close(handle)
                raise _in_use(file.parent, what, holder) from None
            time.sleep(_PAUSE_S)
        os.close(handle)


def _say_no_locks(directory: Path, why: str) -> None:
    tell(f"the file system of '{directory}' has no locks ({why}): nothing keeps a second run out of it")


def _open(file: Path, what: str) -> int:
    tries = 0
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as exc:
            tries += 1
            # Its last holder may have removed the directory in between.
            if isinstance(exc, (FileNotFoundError, FileExistsError)) and tries < _LONGEST_CROWD:
                continue
            raise _cannot_write(file, what, exc) from exc


def _is_named(handle: int, file: Path) -> bool:
    """Tell whether the open file still is the one under this name."""
    try:
        there = file.stat(follow_symlinks=False)
    except OSError:
        return False
    here = os.fstat(handle)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _sign(handle: int) -> None:
    holder = {
        "host": platform.node(),
        "pid": os.getpid(),
        "since": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
    }
    content = (json.dumps(holder) + "\n").encode()
    os.pwrite(handle, content, 0)
    os.ftruncate(handle, len(content))


def _read_holder(handle: int) -> dict[str, Any] | None:
    try:
        holder = json.loads(os.pread(handle, 1 << 16, 0))
    except (OSError, ValueError, RecursionError):
        return None
    return holder if isinstance(holder, dict) and {"pid", "host"} <= holder.keys() else None


def _in_use(directory: Path, what: str, holder: dict[str, Any] | None) -> ArtifactError:
    by = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    where: dict[str, object] = {}
    if holder:
        where = {key: holder[key] for key in ("since", "command") if key in holder}
    return ArtifactError(
        f"the {what} '{directory}' is in use by {by}",
        where=where,
        hint="wait for it or end it, or choose another --out",
    )


def _cannot_write(file: Path, what: str, exc: OSError) -> ArtifactError:
    why = os.strerror(exc.errno or 0).lower()
    return ArtifactError(f"cannot write the {what} '{file.parent}': {why}")
