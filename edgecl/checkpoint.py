"""Checkpoints of a run: safetensors and JSON, held to their hashes, the newest whole one found again."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgecl.artifacts import SCHEMA, RunDir, disk_errors, new_directory, write_json
from edgecl.errors import ArtifactError
from edgecl.onboard.bundle import sha256_of_file

KEEP = 2

_MODEL = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after whole epochs.

    Attributes:
        epoch: epochs done.
        step: steps done.
        model: the training net's tensors by name, host and slim norms.
        optimizer: the optimiser's state dict.
        sha256: hash of state.json, which holds the hashes of the tensors and of its own content.
    """

    epoch: int
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    sha256: str


def write_checkpoint(
    run_dir: RunDir, *, epoch: int, step: int, model: dict[str, Tensor], optimizer: dict[str, Any]
) -> Path:
    """Write a checkpoint aside, rename it into place, and drop all but the newest two.

    Raises:
        ArtifactError: the disk is full; the checkpoints before it are untouched.
    """
    path = run_dir.checkpoint_file(epoch)
    with disk_errors(path):
        if path.exists():
            shutil.rmtree(path)
    tensors, scalars = _flatten(optimizer)
    with new_directory(path, kind="checkpoint") as aside:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in model.items()}, aside / _MODEL
        )
        save_file(tensors, aside / _OPTIMIZER)
        state = {
            "schema": SCHEMA,
            "kind": "checkpoint",
            "epoch": epoch,
            "step": step,
            "optimizer": scalars,
            "sha256": {name: sha256_of_file(aside / name) for name in (_MODEL, _OPTIMIZER)},
        }
        write_json(aside / _STATE, {**state, "own_sha256": _digest(state)})
    # Old checkpoints, and what a killed process left half written.
    for old in [*_existing(run_dir)[:-KEEP], *run_dir.checkpoints.glob(".epoch-*")]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def read_newest(run_dir: RunDir) -> Checkpoint:
    """Read the newest checkpoint that is whole; a torn or changed one is named on stderr and passed over.

    Raises:
        ArtifactError: there is none.
    """
    for path in reversed(_existing(run_dir)):
        problem = _problem_with(path)
        if problem is None:
            return _read(path)
        sys.stderr.write(f"edgecl: checkpoint {path.name} passed over: {problem}\n")
    raise ArtifactError(
        f"the run directory '{run_dir.path}' has no whole checkpoint",
        hint="a run writes its first checkpoint after [run] checkpoint_epochs epochs; start it again with --force",
    )


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state, every tensor in the memory layout of its parameter.

    Files hold contiguous tensors. A fused step walks through memory without looking at strides, and would silently
    pair the moments of a channels-last convolution with the wrong weights.
    """
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entries = optimizer.state.get(parameter, {})
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value).detach()


def has_checkpoint(run_dir: RunDir) -> bool:
    """Tell whether a run has a checkpoint, whole or not."""
    return bool(_existing(run_dir))


def _existing(run_dir: RunDir) -> list[Path]:
    return sorted(run_dir.checkpoints.glob("epoch-*"))


def _problem_with(path: Path) -> str | None:
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        # Runs begun before state.json held its own hash can still go on.
        if state.pop("own_sha256", None) not in (None, _digest(state)):
            return f"{_STATE} does not match its hash"
        for name in (_MODEL, _OPTIMIZER):
            if sha256_of_file(path / name) != state["sha256"][name]:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as complaint:
        return f"unreadable ({complaint})"
    return None


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    return Checkpoint(
        epoch=state["epoch"],
        step=state["step"],
        model=load_file(path / _MODEL),
        optimizer=_unflatten(load_file(path / _OPTIMIZER), state["optimizer"]),
        sha256=sha256_of_file(path / _STATE),
    )


def _flatten(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part an optimiser's state dict into tensors for safetensors and scalars for JSON."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {"groups": optimizer["param_groups"], "state": {}}
    for index, entries in optimizer["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous()
            else:
                scalars["state"].setdefault(str(index), {})[key] = value
    return tensors, scalars


def _unflatten(tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in scalars["state"].items()
    }
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": scalars["groups"]}
