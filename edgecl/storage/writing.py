"""Write files so that a partial one never looks whole: aside, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from edgecl.errors import ArtifactError, EdgeclError

# For a user a file size limit or a quota is the same as a full disk.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.EISDIR),
}
# safetensors, written in Rust, gives the system's error number only in its text.
_ERRNO_IN_TEXT = re.compile(r"\(os error (\d+)\)")
# As `write_bytes` and `outputs.new_directory` name what they write and set aside.
_LEFTOVER = re.compile(r"\..+\.(?P<pid>\d+)-\w+\.(part|old)")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file; a reader sees the old file or the new one, never a part."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file aside, flush it to the disk and rename it.

    Raises:
        ArtifactError: the disk is full; nothing is left behind.
    """
    # Threads of one process may write the same file.
    aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.part")
    try:
        with disk_errors(path):
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Remove files and directories that a killed process left half written, at any depth; the directory must be held.

    Files under this process's own number count as leftovers too: it wrote nothing yet, and containers reuse numbers.
    """
    for parent, folders, files in os.walk(directory):
        for name in [*folders, *files]:
            match = _LEFTOVER.fullmatch(name)
            if match and (int(match["pid"]) == os.getpid() or not _is_running(int(match["pid"]))):
                with contextlib.suppress(OSError):
                    _remove(Path(parent) / name)
        folders[:] = [name for name in folders if not _LEFTOVER.fullmatch(name)]


def _remove(path: Path) -> None:
    """Remove a file or a directory with all in it; a symlink is unlinked, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a refused write into a named error."""
    try:
        yield
    except EdgeclError:
        raise
    except Exception as exc:
        code = _errno_of(exc)
        if code in DISK_FULL:
            raise ArtifactError(
                f"no room on the disk to write '{path.name}'",
                where={"directory": path.parent},
                hint="free some space and run the command again; nothing partial was left",
            ) from exc
        if code in _REFUSED:
            raise ArtifactError(
                f"cannot write '{path.name}': {os.strerror(code).lower()}", where={"directory": path.parent}
            ) from exc
        raise


def _errno_of(exc: Exception) -> int:
    if isinstance(exc, OSError):
        return exc.errno or 0
    found = _ERRNO_IN_TEXT.search(str(exc))
    return int(found[1]) if found else 0


def clear_directory(directory: Path, *, keep: Collection[str]) -> None:
    """Remove all that is in a directory but these names; a symlink is unlinked, not followed."""
    for path in directory.iterdir():
        if path.name not in keep:
            _remove(path)


def flush(path: Path) -> None:
    """Flush one file, or the names in one directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
