"""Checkpoints of a run: safetensors and JSON, held to their hashes, the newest and the best whole one found again."""

from __future__ import annotations

import contextlib
import hashlib
import json
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

from edgecl.errors import ArtifactError, first_line, tell
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.directories import RunDir
from edgecl.storage.reading import read_bytes, read_json
from edgecl.storage.records import SCHEMA
from edgecl.storage.writing import disk_errors, flush, new_directory, write_json

KEEP = 2

_MODEL = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"

# edgecl 0.1 counted epochs. An '.old' one is set aside while one of the same step is written anew.
_NAME = re.compile(r"(?P<unit>epoch|step)-(?P<count>\d+)(?P<old>\.old)?")
_OLD = ".old"
_GROUPS = "groups"
_NOT_FINITE = "not finite"


METHODS_OWN = "method."
"""What the names of tensors begin with that are a method's own, and not the net's."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after so many steps.

    Attributes:
        step: steps done.
        epoch: whole epochs done.
        model: tensors by name: of the training net, host and slim norms, and the method's own.
        optimizer: the optimizer's state dict.
        state: what else a run goes on from, as JSON knows it: numbers, texts, lists and tables.
        quality: {"name", "value"} of the last look at quality, higher is better; None when there was none.
        sha256: hash of state.json, which holds the hashes of the tensors and of its own content.
    """

    step: int
    epoch: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    quality: dict[str, Any] | None
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
    optimizer: dict[str, Any],
    state: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    keep: int = KEEP,
    keep_best: bool = True,
) -> Path:
    """Write a checkpoint aside, flush it, rename it into place, and drop those no longer wanted.

    Args:
        run_dir: the run.
        step: steps done.
        epoch: whole epochs done.
        model: the training net's tensors by name.
        optimizer: the optimizer's state dict.
        state: what else to go on from, as JSON knows it.
        quality: {"name", "value"}, higher is better; one that is not finite counts as none.
        keep: how many of the newest stay, this one among them.
        keep_best: whether the one of the highest quality stays too; of equal ones the newer. Compared are those
            whose quality has the name that the newest has.

    Returns:
        the checkpoint's directory. Checkpoints of later steps are gone then: the run went back behind them.

    Raises:
        ArtifactError: the disk is full; nothing partial is left and the checkpoints before it are untouched.
        TypeError: something JSON cannot hold exactly.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    path = run_dir.checkpoint_file(step)
    model_tensors = _for_file(model)
    optimizer_tensors, scalars = _flatten(optimizer)
    record = {
        "schema": SCHEMA,
        "kind": "checkpoint",
        "step": to_json(step, "step"),
        "epoch": to_json(epoch, "epoch"),
        "quality": _finite(quality),
        "state": to_json(dict(state or {}), "state"),
        "optimizer": scalars,
    }
    _sweep(run_dir)
    with (
        _hint_to_resume(path),
        _same_step_aside(path),
        new_directory(path, kind="checkpoint") as aside,
    ):
        for name, tensors in ((_MODEL, model_tensors), (_OPTIMIZER, optimizer_tensors)):
            save_file(tensors, aside / name)
        record["sha256"] = {name: sha256_of_file(aside / name) for name in (_MODEL, _OPTIMIZER)}
        record["bytes"] = {name: (aside / name).stat().st_size for name in (_MODEL, _OPTIMIZER)}
        write_json(aside / _STATE, {**record, "own_sha256": _digest(record)})
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
    for path in reversed([path for path in records if path not in ranked]):
        with _passing_over(path):
            _read(path)
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
    count = (
        f"{len(names)} checkpoints, and none is whole" if len(names) > 1 else "one checkpoint, and it is torn"
    )
    return ArtifactError(
        f"the run directory '{run_dir.path}' has {count}",
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


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
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
    """Tell whether a run has a checkpoint, whole or not."""
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
        # JSON has no word for these, and what watches over a run may well hold one.
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
    """Let a full disk name the checkpoint and hint at --resume: the command run again as it was would start anew."""
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
    """Set a checkpoint of the same step aside, under a name that is still found, until the new one stands."""
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
    for unit in ("step", "epoch"):
        for part in run_dir.checkpoints.glob(f".{unit}-*"):
            shutil.rmtree(part, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint under another name: a process killed on the way must not leave one that looks torn."""
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
                found.append((match["unit"] == "step", int(match["count"]), match["old"] is None, path))
    return [path for *_, path in sorted(found)]


def _wanted(run_dir: RunDir, *, step: int, keep: int, keep_best: bool) -> set[Path]:
    """Choose the checkpoints to keep, this step's the newest. Torn ones must not push out whole ones."""
    records: dict[Path, dict[str, Any]] = {}
    unread = []
    for path in _existing(run_dir):
        try:
            record = _record_of(path)
        except _NotWholeError as problem:
            # A disk that could not be read just now is no reason to remove what is on it.
            if isinstance(problem.__cause__, OSError) and not isinstance(
                problem.__cause__, FileNotFoundError
            ):
                unread.append(path)
            continue
        if record["step"] < step or path == run_dir.checkpoint_file(step):
            records[path] = record
    best = _by_quality(records)[:1] if keep_best else []
    return {*list(records)[-keep:], *best, *unread}


def _by_quality(records: dict[Path, dict[str, Any]]) -> list[Path]:
    """Return the checkpoints with a quality of the newest's name, best first; of equal ones the newer first."""
    qualities = {path: record["quality"] for path, record in records.items() if record.get("quality")}
    if not qualities:
        return []
    name = list(qualities.values())[-1]["name"]
    paths = [path for path, quality in qualities.items() if quality["name"] == name]
    return sorted(paths, key=lambda path: (qualities[path]["value"], paths.index(path)), reverse=True)


def _record_of(path: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json, held to its own hash, and look whether the files have their length.

    Raises:
        _NotWholeError: torn or changed.
    """
    with _unreadable():
        record = read_json(path / _STATE)
        own = record.pop("own_sha256", None)
        # Runs begun before state.json held its own hash can still go on.
        if own != _digest(record) and not (own is None and path.name.startswith("epoch-")):
            raise _NotWholeError(f"{_STATE} does not match its hash")
        for name, length in record.get("bytes", {}).items():
            found = (path / name).stat().st_size
            if found != length:
                raise _NotWholeError(f"{name} has {found} bytes, not {length}")
        if type(record["step"]) is not int or type(record["epoch"]) is not int:
            raise _NotWholeError(f"{_STATE} counts no whole steps and epochs")
    return dict(record)


def _read(path: Path) -> Checkpoint:
    """Read a checkpoint, held to its hashes.

    Raises:
        _NotWholeError: torn or changed.
    """
    record = _record_of(path)
    tensors = {}
    with _unreadable():
        for name in (_MODEL, _OPTIMIZER):
            # The very bytes that were held to the hash become tensors; a mapped file could change under them.
            content = read_bytes(path / name)
            if hashlib.sha256(content).hexdigest() != record["sha256"][name]:
                raise _NotWholeError(f"{name} does not match its hash")
            tensors[name] = load(content)
            del content
        return Checkpoint(
            step=record["step"],
            epoch=record["epoch"],
            model=tensors[_MODEL],
            optimizer=_unflatten(tensors[_OPTIMIZER], _from_json(record["optimizer"])),
            state=_from_json(record.get("state", {})),
            quality=record.get("quality"),
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


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _finite(quality: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if quality is None or quality["value"] is None or not math.isfinite(quality["value"]):
        return None
    return {"name": str(quality["name"]), "value": float(quality["value"])}


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


def _flatten(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part an optimizer's state dict into tensors for safetensors and scalars for JSON."""
    unknown = sorted(optimizer.keys() - {"state", "param_groups"})
    if unknown:
        raise TypeError(f"an optimizer's state with '{unknown[0]}' in it cannot be kept")
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {_GROUPS: [], "state": {}}
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


def _unflatten(tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in scalars["state"].items()
    }
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if index == _GROUPS:
            number, _, key = key.partition(".")
            scalars[_GROUPS][int(number)][key] = tensor
        else:
            state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": scalars[_GROUPS]}


def _like(now: Any, saved: Any) -> Any:
    """Give an option of an optimizer what a file cannot hold: that it was a tuple, or on which device it was."""
    if isinstance(now, tuple) and isinstance(saved, list):
        return tuple(saved)
    if isinstance(now, Tensor) and isinstance(saved, Tensor):
        return saved.to(now.device)
    return saved
