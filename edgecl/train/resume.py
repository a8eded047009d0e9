"""Going on with an earlier run: what may have changed since, and the checkpoint to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgecl.artifacts import RunDir
from edgecl.checkpoint import Checkpoint, has_checkpoint, read_newest
from edgecl.data.sources import ImageSource
from edgecl.errors import ArtifactError, RecipeError, near_matches
from edgecl.recipe import Recipe, recipe_from_tables
from edgecl.redaction import record_without_secrets

MAY_CHANGE = (
    "run.epochs",
    "run.log_every",
    "run.quality_epochs",
    "run.checkpoint_epochs",
    "run.checkpoint_steps",
    "run.keep_checkpoints",
    "run.keep_best",
    "run.max_skipped",
    "run.trackers",
    "data.workers",
    "data.read_timeout_s",
)
"""Settings that do not decide what a step computes; epochs does change the schedule from here on."""


def check_allowed(keys: Sequence[str]) -> None:
    """Hold the settings a user lets change to those that may.

    Raises:
        RecipeError: one of them decides what a step computes.
    """
    for key in keys:
        if key not in MAY_CHANGE:
            raise RecipeError(f"'{key}' cannot change within a run", hint=near_matches(key, MAY_CHANGE))


def check_recipe(run_dir: RunDir, recipe: Recipe, *, allowed: Sequence[str]) -> list[str]:
    """Hold the recipe to the one the run was started with.

    Args:
        run_dir: of the earlier run.
        recipe: to go on with.
        allowed: settings that may differ, e.g. "run.epochs".

    Returns:
        What changed, one "key was …, now …" each.

    Raises:
        ArtifactError: no run directory.
        RecipeError: something else changed.
    """
    record = _read(run_dir)
    before = recipe_from_tables(record["recipe"], source=str(run_dir.record_file))
    # A record holds no login and no signature, and these may well be new.
    now = record_without_secrets(recipe.model_dump(mode="json"))
    changes = _differences(before.model_dump(mode="json"), now)
    refused = {key: text for key, text in changes.items() if key not in allowed}
    if refused:
        could = [key for key in refused if key in MAY_CHANGE]
        raise RecipeError(
            "cannot resume with another recipe: " + "; ".join(refused.values()),
            where={"run": run_dir.path},
            hint=(
                "to change that on purpose, add " + " ".join(f"--allow {key}" for key in could)
                if len(could) == len(refused)
                else "repeat the command the run was started with, or start a new run in another --out"
            ),
        )
    return list(changes.values())


def was_launched_as(run_dir: RunDir, launch: str | None) -> bool:
    """Tell whether a run was started by this launch of torchrun, and not by an earlier one."""
    return launch is not None and run_dir.record_file.exists() and run_dir.read().get("launch") == launch


def _read(run_dir: RunDir) -> dict[str, Any]:
    """Read the record of a run and hold it to what resuming needs.

    Raises:
        ArtifactError: no run directory, or something is missing in its record.
    """
    record = run_dir.read()
    for table, key in (("recipe", None), ("data", "fingerprint"), ("data", "uri"), ("wall_s", None)):
        found = record.get(table)
        if found is None or (key is not None and (not isinstance(found, dict) or key not in found)):
            raise ArtifactError(
                f"'{run_dir.RECORD}' has no '{table}{'.' + key if key else ''}'",
                where={"file": run_dir.record_file},
                hint="the record was changed by hand or by a fault: start a new run in another --out",
            )
    return record


def check_images(run_dir: RunDir, source: ImageSource) -> None:
    """Hold the images to those the run was started with.

    Raises:
        RecipeError: they are others.
    """
    before = _read(run_dir)["data"]
    if before["fingerprint"] != source.fingerprint:
        raise RecipeError(
            "cannot resume with other images",
            where={"run": run_dir.path, "was": before["uri"], "now": source.uri},
            hint="name the same --data, unchanged, or start a new run in another --out",
        )


def newest_checkpoint(run_dir: RunDir) -> Checkpoint | None:
    """Read the checkpoint a run goes on from; None when it was stopped before its first.

    Raises:
        ArtifactError: it has checkpoints, and none is whole.
    """
    return read_newest(run_dir) if has_checkpoint(run_dir) else None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    return {
        f"{table}.{key}": f"{table}.{key} was {before[table][key]!r}, now {value!r}"
        for table, values in now.items()
        for key, value in values.items()
        if before[table][key] != value
    }
