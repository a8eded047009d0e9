"""Write files and directories so that a partial one never looks whole: aside, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from edgecl.errors import ArtifactError, EdgeclError
from edgecl.onboard.bundle import digest_of_record
from edgecl.storage.directories import PipelineDir, ReportDir, RunDir
from edgecl.storage.record_files import RECORD_FILES, kind_of, read_record
from edgecl.storage.records import RecordT, RunRecord, SealedRecord
from edgecl.storage.redaction import record_without_secrets

# For a user a file size limit or a quota is the same as a full disk.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_PLACE = {errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.EISDIR}
# safetensors, written in Rust, gives the system's error number only in its text.
_ERRNO_IN_TEXT = re.compile(r"\(os error (\d+)\)")
# As `write_bytes` and `new_directory` name what they write and set aside.
_LEFTOVER = re.compile(r"\..+\.(?P<pid>\d+)-\w+\.(part|old)")


def write_record(path: Path, record: RecordT) -> RecordT:
    """Write a record without secrets, a sealed one with the hash of its content, and return it as written.

    Raises:
        ArtifactError: the disk is full; nothing is left behind.
    """
    content = record_without_secrets(record.to_json())
    if isinstance(record, SealedRecord):
        content["sha256"] = digest_of_record(content)
    write_json(path, content)
    return record.model_validate(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file without secrets; a reader sees the old file or the new one, never a part."""
    tidy = record_without_secrets(content)
    write_bytes(path, (json.dumps(tidy, indent=2, allow_nan=False) + "\n").encode())


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
                f"no permission to write '{path.name}'", where={"directory": path.parent}
            ) from exc
        if code in _NO_PLACE:
            raise ArtifactError(
                f"cannot write '{path.name}': {os.strerror(code).lower()}", where={"directory": path.parent}
            ) from exc
        raise


def _errno_of(exc: Exception) -> int:
    if isinstance(exc, OSError):
        return exc.errno or 0
    found = _ERRNO_IN_TEXT.search(str(exc))
    return int(found[1]) if found else 0


def refuse_existing(path: Path, *, force: bool, kind: str) -> None:
    """Check that an output may be written: nothing is there, or, with force, an earlier output of the same kind.

    Raises:
        ArtifactError: the output exists and may not be replaced.
    """
    with disk_errors(path):
        if not path.exists():
            return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not force:
        go_on = "go on with --resume, " if _is_unfinished(path, kind) else ""
        raise ArtifactError(
            f"output '{path}' already exists",
            hint=f"{go_on}choose another --out, or replace it with --force",
        )
    if not path.is_dir() or kind_of(path) != kind:
        name = RECORD_FILES.get(kind)
        why = f": its {name} is not the record of one" if name and (path / name).is_file() else ""
        raise ArtifactError(
            f"--force replaces only a {kind} directory, and '{path}' is not one{why}",
            hint="remove it yourself, or choose another --out",
        )


def refuse_own_input(out: Path, made_from: Path) -> None:
    """Check that an output neither is, holds, nor lies inside the directory that it is made from.

    Raises:
        ArtifactError: written there, it would replace or change its own input.
    """
    output, given = out.resolve(), made_from.resolve()
    if output.is_relative_to(given) or given.is_relative_to(output):
        how = "is" if output == given else "lies inside" if output.is_relative_to(given) else "holds"
        raise ArtifactError(
            f"the output '{out}' {how} the directory '{made_from}' that it is made from",
            hint="choose another --out, outside of it",
        )


def _is_unfinished(path: Path, kind: str) -> bool:
    """Return whether this is a run or a pipeline that `--resume` would take further."""
    if kind_of(path) != kind:
        return False
    if kind == RunDir.KIND:
        return read_record(RunDir(path).record_file, RunRecord, missing_ok=True).state != "done"
    return kind == PipelineDir.KIND and not ReportDir(PipelineDir(path).report).record_file.exists()


@contextlib.contextmanager
def new_directory(path: Path, *, kind: str, force: bool = False) -> Iterator[Path]:
    """Yield a directory to write into that appears under its name only once it is whole.

    Args:
        path: where the directory will be.
        kind: which kind of directory it becomes, a key of RECORD_FILES.
        force: replace an earlier directory of the same kind.

    Raises:
        ArtifactError: the output exists, or the disk is full; then nothing is left behind.
    """
    refuse_existing(path, force=force, kind=kind)
    path = path.resolve()  # '.' and links have no name of their own to rename to
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _mkdtemp_beside(path, suffix=".part")
    try:
        with disk_errors(path):
            yield aside
            aside.chmod(0o755)
            for file in aside.rglob("*"):
                if file.is_file() and not file.stat().st_mode & 0o044:
                    file.chmod(0o644)  # safetensors writes for its owner alone
            flush_tree(aside)
            if path.exists():
                old = _mkdtemp_beside(path, suffix=".old")
                path.replace(old / path.name)
                aside.replace(path)
                shutil.rmtree(old)
            else:
                aside.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _mkdtemp_beside(path: Path, *, suffix: str) -> Path:
    """Make a directory whose name tells `remove_leftovers` which process made it."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.{os.getpid()}-", suffix=suffix, dir=path.parent))


def clear_directory(directory: Path, *, keep: Collection[str]) -> None:
    """Remove all that is in a directory but these names; a symlink is unlinked, not followed."""
    for path in directory.iterdir():
        if path.name not in keep:
            _remove(path)


def flush_tree(directory: Path) -> None:
    """Flush every file of a directory, and the directory, to the disk."""
    for path in [*directory.rglob("*"), directory]:
        flush(path)


def flush(path: Path) -> None:
    """Flush one file, or the names in one directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
