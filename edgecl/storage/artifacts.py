"""What edgecl leaves on disk: the names, and writing so that a partial file never looks whole.

A directory is written aside, flushed to the disk and renamed; a file likewise. Nothing is unpickled.
Every JSON record begins with `schema`, `kind`, `made_by` and `made_from` (the sha256 of what it came from).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgecl import __version__
from edgecl.errors import ArtifactError, EdgeclError
from edgecl.onboard import bundle as bundle_names
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.reading import read_json
from edgecl.storage.redaction import record_without_secrets, without_secrets

SCHEMA = bundle_names.SCHEMA
MADE_BY = f"edgecl {__version__}"

# A limit on file sizes or a quota reads to a user exactly like a full disk.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_PLACE = {errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.EISDIR}
# safetensors is written in Rust and names the system's error only in its text.
_ERRNO_IN_TEXT = re.compile(r"\(os error (\d+)\)")


class RunDir:
    """The directory of one pretraining run: the resolved recipe, metrics and checkpoints."""

    KIND = "run"
    RECORD = "run.json"

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.record_file = self.path / self.RECORD
        self.metrics_file = self.path / "metrics.jsonl"
        self.views_file = self.path / "views.png"
        self.checkpoints = self.path / "checkpoints"

    def checkpoint_file(self, step: int) -> Path:
        """Return the directory of the checkpoint after so many steps."""
        return self.checkpoints / f"step-{step:09d}"

    def read(self) -> dict[str, Any]:
        """Return the run's record.

        Raises:
            ArtifactError: not a run directory.
        """
        return read_record(self.record_file, kind=self.KIND)


class ModelDir:
    """The directory of one small net: its description and its weights."""

    KIND = "model"
    RECORD = "model.json"

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.record_file = self.path / self.RECORD
        self.weights_file = self.path / "weights.safetensors"
        self.probe_file = self.path / "probe.json"
        self.cost_file = self.path / "cost.json"
        self.evaluation_file = self.path / "evaluation.json"

    def read(self) -> dict[str, Any]:
        """Return the model's record, once it and the weights have been held to their hashes.

        Raises:
            ArtifactError: not a model directory, or the weights changed since it was written.
        """
        record = read_record(self.record_file, kind=self.KIND, whole=True)
        check_seal(
            record,
            {"file": self.record_file},
            hint="the file changed after it was written; carve or fine-tune it again",
        )
        if not self.weights_file.is_file():
            raise ArtifactError("the model's weights are missing", where={"file": self.weights_file})
        found = sha256_of_file(self.weights_file)
        if found != record["weights_sha256"]:
            raise ArtifactError(
                f"the weights do not match their hash: model.json says {record['weights_sha256'][:12]}…, "
                f"the file has {found[:12]}…",
                where={"file": self.weights_file},
                hint="the file changed after it was written; carve or fine-tune it again",
            )
        return record

    @property
    def sha256(self) -> str:
        """Hash of the model's record, which itself holds the hash of the weights."""
        return sha256_of_file(self.record_file)


class Bundle:
    """The directory a device gets: ONNX, manifest, reference inputs and outputs, and the code that runs them."""

    KIND = bundle_names.KIND
    RECORD = bundle_names.MANIFEST

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.record_file = self.path / bundle_names.MANIFEST
        self.reference_file = self.path / bundle_names.REFERENCE
        self.verify_file = self.path / bundle_names.VERIFY
        self.onboard_file = self.path / bundle_names.ONBOARD
        self.readme_file = self.path / bundle_names.README
        self.trtexec_file = self.path / bundle_names.TRTEXEC

    def onnx_file(self, precision: str = "fp32") -> Path:
        """Return the net in a precision."""
        return self.path / bundle_names.onnx_name(precision)

    def bench_file(
        self, device: str, *, runtime: str, precisions: Sequence[str], threads: int, batch: int
    ) -> Path:
        """Return the record of a measurement on a device."""
        return self.path / bundle_names.bench_name(device, runtime, precisions, threads, batch)

    def read(self) -> dict[str, Any]:
        """Return the manifest, held to its own hash; `verify` holds the files to theirs.

        Raises:
            ArtifactError: not a bundle, or the manifest changed since it was written.
        """
        record = read_record(self.record_file, kind=self.KIND)
        check_seal(
            record, {"file": self.record_file}, hint="the file changed after export; export the bundle again"
        )
        return record


class ReportDir:
    """The directory of one report: a page, a text and the numbers behind them."""

    KIND = "report"
    RECORD = "report.json"

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.record_file = self.path / self.RECORD
        self.page_file = self.path / "report.html"
        self.text_file = self.path / "report.md"


class PipelineDir:
    """The directory of `edgecl run`: every stage's output, one folder each, and the comparison."""

    KIND = "pipeline"
    RECORD = "pipeline.json"

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.record_file = self.path / self.RECORD
        self.run = self.path / "pretrain"
        self.slim = self.path / "slim"
        self.random = self.path / "random"
        self.comparison_file = self.path / "comparison.json"
        self.bundles = self.path / "bundles"
        self.report = self.path / "report"


KINDS: tuple[type[RunDir | ModelDir | Bundle | ReportDir | PipelineDir], ...] = (
    RunDir,
    ModelDir,
    Bundle,
    ReportDir,
    PipelineDir,
)


RECORDS = {kind.KIND: kind.RECORD for kind in KINDS}
"""Kind of directory -> the file of its record."""
# As `write_bytes` and `new_directory` name what they write and set aside.
_LEFTOVER = re.compile(r"\..+\.(?P<pid>\d+)-\w+\.(part|old)")


def kind_of(path: Path) -> str | None:
    """Return which kind of edgecl output a directory is, or None.

    The record itself must say so: a user's own folder may well hold a model.json or a manifest.json.
    """
    for kind in KINDS:
        try:
            record = read_json(path / kind.RECORD)
        except (FileNotFoundError, NotADirectoryError, ArtifactError):
            continue
        if isinstance(record, dict) and record.get("kind") == kind.KIND and "schema" in record:
            return kind.KIND
    return None


def record_header(kind: str, *, made_from: str | None) -> dict[str, Any]:
    """Return the first keys of every record, with the command that makes it."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "made_by": MADE_BY,
        "made_from": made_from,
        "command": command_line(),
    }


def command_line() -> str:
    """Return the command this process was started with, as one would type it again."""
    import shlex

    return (
        shlex.join(["edgecl", *map(without_secrets, sys.argv[1:])])
        if Path(sys.argv[0]).stem in ("edgecl", "__main__")
        else "python"
    )


def read_record(path: Path, *, kind: str, whole: bool = False) -> dict[str, Any]:
    """Read a JSON record and hold it to its kind and schema, and to the types that the host relies on.

    Args:
        path: the file.
        kind: what it should be the record of.
        whole: whether it must have every entry that the host relies on.

    Raises:
        ArtifactError: missing, no regular file, not JSON, of another kind, of a newer schema than this edgecl knows, or
            with an entry of another type.
    """
    if not path.exists():
        found = kind_of(path.parent) if path.parent.is_dir() else None
        problem = f"'{path.parent}' is not a {kind} directory"
        problem += f" but a {found} directory" if found else f": it has no {path.name}"
        raise ArtifactError(problem, hint=_HOW_TO_MAKE.get(kind))
    record = read_json(path)
    if not isinstance(record, dict) or record.get("kind") != kind:
        raise ArtifactError(f"'{path.name}' is not the record of a {kind}", where={"file": path})
    _check(record, path, whole=whole)
    return record


def read_side_record(path: Path) -> dict[str, Any]:
    """Read a JSON record that lies beside another one, of whatever kind.

    Raises:
        ArtifactError: no regular file, not JSON, no record, of a newer schema, or with an entry of another type.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise ArtifactError(f"'{path.name}' is not a record", where={"file": path})
    _check(record, path, whole=False)
    return record


def _check(record: dict[str, Any], path: Path, *, whole: bool) -> None:
    from edgecl.storage.raw_records import check_record

    schema = record.get("schema", 0)
    if not isinstance(schema, int):
        raise ArtifactError(f"'{path.name}' has the schema {schema!r}, not a number", where={"file": path})
    if schema > SCHEMA:
        raise ArtifactError(
            f"'{path.name}' has schema {record['schema']}, this edgecl reads up to {SCHEMA}",
            where={"file": path, "made by": record.get("made_by")},
            hint="upgrade edgecl",
        )
    check_record(record, path=path, whole=whole)


_HOW_TO_MAKE = {
    "run": "`edgecl pretrain` writes run directories",
    "model": "`edgecl carve` and `edgecl finetune` write model directories",
    "bundle": "`edgecl export` writes bundles",
}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, without secrets, so that a reader sees the old one or the new one, never a part."""
    tidy = record_without_secrets(content)
    write_bytes(path, (json.dumps(tidy, indent=2, allow_nan=False) + "\n").encode())


def check_seal(record: dict[str, Any], where: dict[str, object], *, hint: str) -> None:
    """Hold a record that `write_sealed` wrote to its own hash.

    Raises:
        ArtifactError: it changed since.
    """
    if record.get("sha256") != bundle_names.digest_of_record(record):
        name = {ModelDir.KIND: ModelDir.RECORD, Bundle.KIND: Bundle.RECORD}[record["kind"]]
        raise ArtifactError(f"'{name}' does not match the hash of its own content", where=where, hint=hint)


def write_sealed(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write a record with the hash of its own content, and return it so."""
    record = record_without_secrets(record)
    sealed = {**record, "sha256": bundle_names.digest_of_record(record)}
    write_json(path, sealed)
    return sealed


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

    Those of this very process too: it wrote nothing yet, and in a container one number comes again and again.
    """
    for parent, folders, files in os.walk(directory):
        for name in [*folders, *files]:
            match = _LEFTOVER.fullmatch(name)
            if match and (int(match["pid"]) == os.getpid() or not _is_running(int(match["pid"]))):
                with contextlib.suppress(OSError):
                    _remove(Path(parent) / name)
        folders[:] = [name for name in folders if not _LEFTOVER.fullmatch(name)]


def _remove(path: Path) -> None:
    """Remove a file or a directory with all in it; of a link the link alone."""
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
    """Refuse an output that is in the way; with force, refuse only what edgecl did not write.

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
        name = RECORDS.get(kind)
        why = f": its {name} is not the record of one" if name and (path / name).is_file() else ""
        raise ArtifactError(
            f"--force replaces only a {kind} directory, and '{path}' is not one{why}",
            hint="remove it yourself, or choose another --out",
        )


def refuse_own_input(out: Path, made_from: Path) -> None:
    """Refuse an output that is, holds or lies inside the directory that it is made from.

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
    """Tell whether this is a run or a pipeline that `--resume` would take further."""
    if kind_of(path) != kind:
        return False
    if kind == RunDir.KIND:
        return bool(RunDir(path).read().get("state", "done") != "done")
    return kind == PipelineDir.KIND and not ReportDir(PipelineDir(path).report).record_file.exists()


@contextlib.contextmanager
def new_directory(path: Path, *, kind: str, force: bool = False) -> Iterator[Path]:
    """Give a directory to write into that appears under its name only once it is whole.

    Args:
        path: where the directory shall stand.
        kind: which kind of directory it becomes, one of KINDS.
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
    """Make a directory that `remove_leftovers` knows as this process's."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.{os.getpid()}-", suffix=suffix, dir=path.parent))


def clear_directory(directory: Path, *, keep: Collection[str]) -> None:
    """Remove all that is in a directory but these names; of links the link alone."""
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
