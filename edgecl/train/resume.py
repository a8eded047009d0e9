"""Going on with an earlier run: what may have changed since, and the checkpoint to go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgecl.config.recipe import Recipe, flatten, recipe_from_tables
from edgecl.data.loading import TrainingImages
from edgecl.data.source import ImageSource
from edgecl.data.sources import absolute_uri
from edgecl.errors import ArtifactError, RecipeError, first_of, near_matches
from edgecl.storage.checkpoint import Checkpoint, has_checkpoint, read_newest
from edgecl.storage.directories import RunDir
from edgecl.storage.records import RunRecord
from edgecl.storage.redaction import record_without_secrets

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
    "data.max_bad_fraction",
)
"""Settings that do not decide what a step computes; epochs does change the schedule from here on."""

IMAGES = "data"
"""What stands for the images themselves where settings are allowed to differ."""

_WITH_OTHERS = (
    f"go on with those there are by --allow {IMAGES}: their order, and with their number the schedule, is another from "
    "here on; or start a new run in another --out"
)


def check_allowed(keys: Sequence[str], recipe: Recipe) -> None:
    """Check that the settings a user lets change are those that may.

    Raises:
        RecipeError: one of them decides what a step computes.
    """
    for key in keys:
        if key not in (*MAY_CHANGE, IMAGES):
            raise RecipeError(
                f"'{key}' cannot change within a run"
                if key in flatten(recipe.model_dump())
                else f"there is no setting '{key}'",
                hint=near_matches(key, [*MAY_CHANGE, IMAGES]),
            )


def check_recipe(run_dir: RunDir, recipe: Recipe, *, allowed: Sequence[str]) -> list[str]:
    """Compare the recipe with the one the run was started with; settings such as "run.epochs" may be allowed to differ.

    Returns:
        What changed, one "key was …, now …" each.

    Raises:
        ArtifactError: no run directory.
        RecipeError: something else changed.
    """
    before = recipe_from_tables(run_dir.read().recipe, source=str(run_dir.record_file))
    # A record holds no login and no signature, and these may well be new.
    now = record_without_secrets(recipe.model_dump(mode="json"))
    changes = differences(before.model_dump(mode="json"), now)
    refused = {key: text for key, text in changes.items() if key not in allowed}
    if refused:
        could = [key for key in refused if key in MAY_CHANGE]
        # Another method has other settings too.
        told = [refused["method.name"]] if "method.name" in refused else refused.values()
        raise RecipeError(
            "cannot resume with another recipe: " + "; ".join(told),
            where={"run": run_dir.path},
            hint=(
                "to change that on purpose, add " + " ".join(f"--allow {key}" for key in could)
                if len(could) == len(refused)
                else "repeat the command the run was started with, or start a new run in another --out"
            ),
        )
    return list(changes.values())


def check_source(run_dir: RunDir, source: ImageSource, *, allowed: Sequence[str]) -> list[str]:
    """Compare the images with those the run was started with, by names and sizes.

    Returns:
        What changed, in one text, where that is allowed.

    Raises:
        RecipeError: they are others.
    """
    before = run_dir.read().data
    if before.fingerprint == source.fingerprint:
        return []
    was = before.uri if before.found is None else f"{before.uri} with {before.found:,} images"
    now = f"{absolute_uri(source.uri)} with {len(source):,} images"
    if IMAGES in allowed:
        return [f"the images were {was}, now {now}"]
    raise RecipeError(
        "cannot resume with other images",
        where={"run": run_dir.path, "was": was, "now": now},
        hint=f"bring them back as they were, name by name and of the same sizes; or {_WITH_OTHERS}",
    )


def check_rests_on(run_dir: RunDir, rests_on: dict[str, str]) -> None:
    """Compare what the method rests on besides pictures with what the run was started with.

    Raises:
        RecipeError: it is something else.
    """
    before = run_dir.read().rests_on
    for what, sha256 in rests_on.items():
        if before.get(what) != sha256:
            raise RecipeError(
                f"cannot resume with another {what}",
                where={"run": run_dir.path, "was": before.get(what), "now": sha256},
                hint="bring its weights back as they were, or start a new run in another --out",
            )


def check_images(run_dir: RunDir, images: TrainingImages, *, allowed: Sequence[str]) -> list[str]:
    """Compare images in memory with those the run was started with: each one less moves all others in the order.

    Images that are read batch by batch keep their places, and another stands in for an unreadable one.

    Returns:
        What changed, in one text, where that is allowed.

    Raises:
        RecipeError: some cannot be read any more.
    """
    known = set(run_dir.read().data.skipped)
    gone = [name for name in images.skipped if name not in known] if images.is_cached else []
    if not gone:
        return []
    named = first_of(gone)
    if IMAGES in allowed:
        return [f"the images lost {len(gone):,} that cannot be read any more: {named}"]
    raise RecipeError(
        f"cannot resume: {len(gone):,} of the run's images cannot be read any more",
        where={"run": run_dir.path, "unreadable": named},
        hint=f"repair them; or {_WITH_OTHERS}",
    )


def newest_checkpoint(run_dir: RunDir) -> Checkpoint | None:
    """Read the checkpoint a run goes on from; None when it was stopped before its first.

    Raises:
        ArtifactError: it has checkpoints, and none is whole; or it had some, and they are gone.
    """
    if has_checkpoint(run_dir):
        return read_newest(run_dir)
    step = run_dir.read().step
    if step > 0:
        raise ArtifactError(
            f"the run is at step {step}, and its checkpoints are gone",
            where={"directory": run_dir.checkpoints},
            hint="bring them back (is the disk they are on mounted?), or start anew with --force",
        )
    return None


def other_surroundings(before: RunRecord, now: RunRecord) -> list[str]:
    """Name what differs between two records of a run that makes results differ in their last digits.

    Returns:
        one "key was …, now …" each.
    """
    found: dict[str, tuple[object, object]] = {
        key: (getattr(before, key), getattr(now, key)) for key in ("device", "processes", "threads")
    }
    found |= {name: (before.versions.get(name), version) for name, version in now.versions.items()}
    return [f"{key} was {was}, now {is_}" for key, (was, is_) in found.items() if was not in (None, is_)]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs between two recipes' tables: "table.key" -> "table.key was …, now …"."""
    was, is_ = flatten(before), flatten(now)
    return {
        key: f"{key} was {was.get(key)!r}, now {is_.get(key)!r}"
        for key in {**was, **is_}
        if (key in was, was.get(key)) != (key in is_, is_.get(key))
    }
