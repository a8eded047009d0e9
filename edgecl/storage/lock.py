"""One writer per directory: a lock that the system frees when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from edgecl.errors import ArtifactError, tell
from edgecl.storage.reading import read_json
from edgecl.storage.records import command_line
from edgecl.storage.writing import remove_leftovers

NAME = ".lock"

_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_MOST_TRIES = 20


@contextlib.contextmanager
def hold(directory: Path, *, what: str) -> Iterator[None]:
    """Hold a directory, made if it is missing, so that no other process writes into it.

    The lock is an flock(2) on the file `.lock`, which names its holder and stays beside what was written. Where nothing
    was written it goes again, and with it the directories that were made. What a killed process left half written is
    removed. Where the file system has no locks a line on stderr says so, and the directory is not held.

    Raises:
        ArtifactError: another process holds it, or it cannot be written.
    """
    file = directory / NAME
    lock = FileLock(file, timeout=0)
    made: list[Path] = []
    try:
        try:
            made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
            _take(lock, file)
        except Timeout:
            raise _in_use(file, what) from None
        except OSError as exc:
            why = os.strerror(exc.errno or 0).lower()
            raise ArtifactError(f"cannot write the {what} '{directory}': {why}") from exc
        remove_leftovers(directory)
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                if list(directory.iterdir()) == [file]:
                    file.unlink()  # while it is held: who waits for it then finds that it is gone
        lock.release()
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()  # only an empty one, and then not those above


def _take(lock: FileLock, file: Path) -> None:
    """Lock the file and write the holder into it."""
    for tries in range(1, _MOST_TRIES + 1):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            break
        except (FileNotFoundError, FileExistsError):
            if tries == _MOST_TRIES:
                raise
            # Its last holder removed the directory in between; mkdir calls that an existing file.
        except OSError as exc:
            if exc.errno not in _NO_LOCKS_HERE:
                raise
            tell(
                f"the file system of '{file.parent}' has no locks ({os.strerror(exc.errno)}): "
                "nothing keeps a second run out of it"
            )
            return
    holder = {
        "host": platform.node(),
        "pid": os.getpid(),
        "since": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
    }
    try:
        file.write_text(json.dumps(holder) + "\n", encoding="utf-8")
    except OSError:
        file.unlink()  # of a full disk
        raise


def _in_use(file: Path, what: str) -> ArtifactError:
    """Return the error for a directory that is held, with its holder if the file names one."""
    holder = {}
    with contextlib.suppress(OSError, ArtifactError):
        found = read_json(file)
        if isinstance(found, dict) and {"pid", "host"} <= found.keys():
            holder = found
    by = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return ArtifactError(
        f"the {what} '{file.parent}' is in use by {by}",
        where={key: holder[key] for key in ("since", "command") if key in holder},
        hint="wait for it or end it, or choose another --out",
    )
