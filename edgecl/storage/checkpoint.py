"""Checkpoints of a run: safetensors and JSON with their hashes, and the newest or the best whole one of them."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from edgecl.errors import ArtifactError, counted, first_line, tell
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.directories import RunDir
from edgecl.storage.outputs import new_directory
from edgecl.storage.reading import read_bytes
from edgecl.storage.record_files import read_record, write_record
from edgecl.storage.records import CheckpointRecord, Json, Quality
from edgecl.storage.writing import disk_errors, flush

KEEP = 2

_MODEL = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = CheckpointRecord.FILE

# An '.old' one is set aside while one of the same step is written anew.
_NAME = re.compile(r"step-(?P<count>\d+)(?P<old>\.old)?")
_OLD = ".old"
_GROUPS = "groups"
_NOT_FINITE = "not finite"


# What torch's `state_dict` returns.
StateDict = dict[str, Any]

METHODS_OWN = "method."
"""Prefix of the names of tensors that belong to the method, not to the net."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after so many steps and whole epochs.

    `model` are the tensors of the training net and of the method; `sha256` is that of state.json, which holds theirs.
    """

    step: int
    epoch: int
    model: dict[str, Tensor]
    optimizer: StateDict
    state: Json
    quality: Quality | None
    sha256: str

    @property
    def net(self) -> dict[str, Tensor]:
        """Those tensors that are the training net's."""
        return {name: tensor for name, tensor in self.model.items() if not name.startswith(METHODS_OWN)}


def write_checkpoint(
    run_dir: RunDir,
    *,
    step: int,
    epoch: int,
    model: Mapping[str, Tensor],
    optimizer: StateDict,
    state: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    keep: int = KEEP,
    keep_best: bool = True,
) -> Path:
    """Write a checkpoint aside, flush it, rename it into place, and drop those no longer wanted.

    Args:
        epoch: whole epochs done.
        model: the training net's tensors by name.
        optimizer: the optimizer's state dict.
        state: what else to go on from, as JSON knows it.
        quality: {"name", "value"}, higher is better; one that is not finite counts as none.
        keep: how many of the newest stay, this one among them, at least 1.
        keep_best: whether the one of the highest quality stays too; of equal ones the newer. Compared are those
            whose quality has the name that the newest has.

    Returns:
        the checkpoint's directory. Checkpoints of later steps are gone then: the run went back behind them.

    Raises:
        ArtifactError: the disk is full; nothing partial is left and the checkpoints before it are untouched.
        TypeError: something JSON cannot hold exactly.
    """
    path = run_dir.checkpoint_file(step)
    model_tensors = _for_file(model)
    optimizer_tensors, scalars = _flatten(optimizer)
    record = CheckpointRecord(
        made_from=None,
        step=to_json(step, "step"),
        epoch=to_json(epoch, "epoch"),
        quality=_finite(quality),
        state=to_json(dict(state or {}), "state"),
        optimizer=scalars,
        files={},
        size_bytes={},
    )
    _sweep(run_dir)
    with _hint_to_resume(path), _same_step_aside(path), new_directory(path, kind="checkpoint") as aside:
        for name, tensors in ((_MODEL, model_tensors), (_OPTIMIZER, optimizer_tensors)):
            save_file(tensors, aside / name)
            record.files[name] = sha256_of_file(aside / name)
            record.size_bytes[name] = (aside / name).stat().st_size
        write_record(aside / _STATE, record)
    flush(run_dir.checkpoints)  # the new name is on the disk before an old one goes
    wanted = _wanted(run_dir, step=step, keep=keep, keep_best=keep_best)
    for old in _existing(run_dir):
        if old not in wanted:
            _remove(old)
    return path


def read_newest(run_dir: RunDir) -> Checkpoint:
    """Read the newest checkpoint that is whole; a torn or changed one is named on stderr and passed over.

    Raises:
        ArtifactError: there is none.
    """
    for path in reversed(_existing(run_dir)):
        with _passing_over(path):
            return _read(path)
    raise _none_whole(run_dir)


def read_best(run_dir: RunDir) -> Checkpoint:
    """Read the whole checkpoint of the highest quality; a torn or changed one is named on stderr and passed over.

    Raises:
        ArtifactError: none that is whole has a quality.
    """
    records = {}
    for path in _existing(run_dir):
        with _passing_over(path):
            records[path] = _record_of(path)
    ranked = _by_quality(records)
    for path in ranked:
        with _passing_over(path):
            return _read(path)
    if records and not ranked:
        raise ArtifactError(
            f"the run directory '{run_dir.path}' has no whole checkpoint with a quality",
            hint="a run looks at quality every [run] quality_epochs epochs; take its newest checkpoint instead",
        )
    raise _none_whole(run_dir)


def _none_whole(run_dir: RunDir) -> ArtifactError:
    names = [path.name for path in _existing(run_dir)]
    if not names:
        return ArtifactError(
            f"the run directory '{run_dir.path}' has no checkpoint",
            hint="a run writes its first checkpoint after [run] checkpoint_epochs epochs; start it again with --force",
        )
    return ArtifactError(
        f"the run directory '{run_dir.path}' has {counted(len(names), 'checkpoint')}, and none is whole",
        where={"torn": ", ".join(names)},
        hint="restore one from a copy, or start the run again with --force",
    )


def read_sealed(run_dir: RunDir, sha256: str) -> Checkpoint | None:
    """Read the checkpoint with a hash, as something made from it names it; None when it is gone or not whole."""
    for path in _existing(run_dir):
        with contextlib.suppress(OSError, _NotWholeError):
            if path.joinpath(_STATE).is_file() and sha256_of_file(path / _STATE) == sha256:
                return _read(path)
    return None


def restore_optimizer(optimizer: torch.optim.Optimizer, state: StateDict) -> None:
    """Load an optimizer's state, every tensor in the memory layout of its parameter.

    Files hold contiguous tensors. A fused step walks through memory without looking at strides, and would silently
    pair the moments of a channels-last convolution with the wrong weights.
    """
    groups = [
        {key: _like(now.get(key), value) for key, value in saved.items()}
        for now, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entries = optimizer.state.get(parameter, {})
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value).detach()


def has_checkpoint(run_dir: RunDir) -> bool:
    """Return whether a run has a checkpoint, whole or not."""
    return bool(_existing(run_dir))


def to_json(value: Any, name: str) -> Any:
    """Return a value as JSON holds it exactly: numbers of numpy and torch as Python's own, tuples as lists.

    Raises:
        TypeError: something else; the name says where.
    """
    if isinstance(value, numpy.generic) or (isinstance(value, Tensor) and value.dim() == 0):
        value = value.item()
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        # JSON has no infinity and no NaN, which the state of a run may hold.
        return value if math.isfinite(value) else {_NOT_FINITE: str(value)}
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise TypeError(f"{name} has the key {key!r}, and JSON knows only texts")
        return {key: to_json(item, f"{name}.{key}") for key, item in value.items()}
    raise TypeError(f"{name} is a {type(value).__name__}, which JSON cannot hold exactly")


class _NotWholeError(Exception):
    """A checkpoint that is torn or changed; the text says how."""


@contextlib.contextmanager
def _passing_over(path: Path) -> Iterator[None]:
    try:
        yield
    except _NotWholeError as problem:
        tell(f"checkpoint {path.name} passed over: {problem}")


@contextlib.contextmanager
def _hint_to_resume(path: Path) -> Iterator[None]:
    """Name the checkpoint in a full disk's error, and --resume: the same command would start a new run."""
    try:
        yield
    except ArtifactError as problem:
        if not problem.problem.startswith("no room on the disk"):
            raise
        raise ArtifactError(
            f"no room on the disk to write '{path.name}'",
            where={"directory": path.parent},
            hint="free some space and go on with --resume; nothing partial was left, the checkpoints before are whole",
        ) from problem.__cause__


@contextlib.contextmanager
def _same_step_aside(path: Path) -> Iterator[None]:
    """Rename a checkpoint of the same step, so that it is still found, until the new one is in place."""
    earlier = path.with_name(path.name + _OLD)
    with disk_errors(path):
        if path.exists():
            _remove(earlier)
            path.replace(earlier)
    try:
        yield
    except BaseException:
        if earlier.exists() and not path.exists():
            earlier.replace(path)
        raise


def _sweep(run_dir: RunDir) -> None:
    """Remove what a killed process left half written."""
    for part in run_dir.checkpoints.glob(".step-*"):
        shutil.rmtree(part, ignore_errors=True)


def _remove(path: Path) -> None:
    """Rename a checkpoint, then remove it: a process killed in between leaves none that looks torn."""
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.replace(gone)
        shutil.rmtree(gone)


def _existing(run_dir: RunDir) -> list[Path]:
    """Return the checkpoints by name, whole or not, oldest first."""
    found = []
    if run_dir.checkpoints.is_dir():
        for path in run_dir.checkpoints.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match["count"]), match["old"] is None, path))
    return [path for *_, path in sorted(found)]


def _wanted(run_dir: RunDir, *, step: int, keep: int, keep_best: bool) -> set[Path]:
    """Return the checkpoints to keep, this step's as the newest; torn ones are not counted."""
    records: dict[Path, CheckpointRecord] = {}
    unread = []
    for path in _existing(run_dir):
        try:
            record = _record_of(path)
        except _NotWholeError as problem:
            # Kept: the disk may only be unreadable just now.
            if isinstance(problem.__cause__, OSError) and not isinstance(
                problem.__cause__, FileNotFoundError
            ):
                unread.append(path)
            continue
        if record.step < step or path == run_dir.checkpoint_file(step):
            records[path] = record
    best = _by_quality(records)[:1] if keep_best else []
    return {*list(records)[-keep:], *best, *unread}


def _by_quality(records: dict[Path, CheckpointRecord]) -> list[Path]:
    """Return the checkpoints whose quality has the newest's name, best first; of equal ones the newer first."""
    qualities = {path: record.quality for path, record in records.items() if record.quality}
    if not qualities:
        return []
    name = list(qualities.values())[-1].name
    paths = [path for path, quality in qualities.items() if quality.name == name]
    return sorted(paths, key=lambda path: (qualities[path].value, paths.index(path)), reverse=True)


def _record_of(path: Path) -> CheckpointRecord:
    """Read a checkpoint's state.json, and check that its files have their sizes."""
    with _unreadable():
        (path / _STATE).stat()  # an unreadable disk raises OSError here, and is not taken for a missing file
        record = read_record(path / _STATE, CheckpointRecord)
        for name, size in record.size_bytes.items():
            found = (path / name).stat().st_size
            if found != size:
                raise _NotWholeError(f"{name} has {found} bytes, not {size}")
    return record


def _read(path: Path) -> Checkpoint:
    """Read a checkpoint and compare its files with their hashes."""
    record = _record_of(path)
    tensors = {}
    with _unreadable():
        for name in (_MODEL, _OPTIMIZER):
            # The very bytes that were hashed become tensors; a mapped file could change under them.
            content = read_bytes(path / name)
            if hashlib.sha256(content).hexdigest() != record.files[name]:
                raise _NotWholeError(f"{name} does not match its hash")
            tensors[name] = load(content)
            del content
        return Checkpoint(
            step=record.step,
            epoch=record.epoch,
            model=tensors[_MODEL],
            optimizer=_unflatten(tensors[_OPTIMIZER], _from_json(record.optimizer)),
            state=_from_json(record.state),
            quality=record.quality,
            sha256=sha256_of_file(path / _STATE),
        )


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        ArtifactError,
        SafetensorError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as exc:
        raise _NotWholeError(f"unreadable ({first_line(exc)})") from exc


def _finite(quality: Mapping[str, Any] | None) -> Quality | None:
    if quality is None or quality["value"] is None or not math.isfinite(quality["value"]):
        return None
    return Quality(name=str(quality["name"]), value=float(quality["value"]))


def _from_json(value: Any) -> Any:
    """Undo `to_json`, but for tuples."""
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        if list(value) == [_NOT_FINITE]:
            return float(value[_NOT_FINITE])
        return {key: _from_json(item) for key, item in value.items()}
    return value


def _for_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the CPU, contiguous, no two in one storage."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        ready[name] = tensor.detach().cpu().contiguous()
        storage = ready[name].untyped_storage().data_ptr()
        if storage in storages:
            ready[name] = ready[name].clone()
        storages.add(storage)
    return ready


def _flatten(optimizer: StateDict) -> tuple[dict[str, Tensor], Json]:
    """Split an optimizer's state dict into tensors for safetensors and scalars for JSON."""
    tensors: dict[str, Tensor] = {}
    scalars: Json = {_GROUPS: [], "state": {}}
    for number, group in enumerate(optimizer["param_groups"]):
        scalars[_GROUPS].append({})
        for key, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"{_GROUPS}.{number}.{key}"] = value
            else:
                scalars[_GROUPS][-1][key] = to_json(value, f"optimizer.{_GROUPS}[{number}].{key}")
    for index, entries in optimizer["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                place = scalars["state"].setdefault(str(index), {})
                place[key] = to_json(value, f"optimizer.state[{index}].{key}")
    return _for_file(tensors), scalars


def _unflatten(tensors: dict[str, Tensor], scalars: Json) -> StateDict:
    state: dict[int, StateDict] = {int(index): dict(entries) for index, entries in scalars["state"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if index == _GROUPS:
            number, _, key = key.partition(".")
            scalars[_GROUPS][int(number)][key] = tensor
        else:
            state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": scalars[_GROUPS]}


def _like(now: Any, saved: Any) -> Any:
    """Restore what a file cannot hold of an optimizer's option: that it was a tuple, or its device."""
    if isinstance(now, tuple) and isinstance(saved, list):
        return tuple(saved)
    if isinstance(now, Tensor) and isinstance(saved, Tensor):
        return saved.to(now.device)
    return saved
