"""Make the directories that verbs write: refuse what must not be replaced, and appear only once whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgecl.errors import ArtifactError
from edgecl.storage.directories import PipelineDir, ReportDir, RunDir
from edgecl.storage.record_files import RECORD_FILES, kind_of, read_record
from edgecl.storage.records import RunRecord
from edgecl.storage.writing import disk_errors, flush


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
            f"output '{path}' already exists", hint=f"{go_on}choose another --out, or replace it with --force"
        )
    if not path.is_dir() or kind_of(path) != kind:
        name = RECORD_FILES.get(kind)
        why = f": its {name} is not the record of one" if name and (path / name).is_file() else ""
        raise ArtifactError(
            f"--force replaces only a {kind} directory, and '{path}' is not one{why}",
            hint="remove it yourself, or choose another --out",
        )


def refuse_existing_file(path: Path, *, force: bool) -> None:
    """Check that a single file may be written: nothing is there, or, with force, a file.

    Raises:
        ArtifactError: the output exists and may not be replaced.
    """
    with disk_errors(path):
        exists, is_file = path.exists(), path.is_file()
    if exists and not (force and is_file):
        raise ArtifactError(
            f"output '{path}' already exists" + ("" if is_file else ", and is no file"),
            hint="choose another --out" + (", or replace it with --force" if is_file else ""),
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
        return read_record(RunDir(path).record_file, RunRecord).state != "done"
    return kind == PipelineDir.KIND and not ReportDir(PipelineDir(path).report).record_file.exists()


@contextlib.contextmanager
def new_directory(path: Path, *, kind: str, force: bool = False) -> Iterator[Path]:
    """Yield a directory to write into that appears under its name only once it is whole.

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
            for inside in [*aside.rglob("*"), aside]:
                if inside.is_file() and not inside.stat().st_mode & 0o044:
                    inside.chmod(0o644)  # safetensors writes for its owner alone
                flush(inside)
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
