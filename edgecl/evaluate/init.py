"""The verb `init`: a folder of pictures in, a recipe for it and for this machine out, with its reasons and its price."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch

from edgecl.config.proposal import (
    Choice,
    advise,
    choose_length,
    choose_recipe,
    describe,
    hours_of,
    length_in_words,
    recipe_text,
    with_batch,
)
from edgecl.config.target import read_target
from edgecl.data.source import ImageSource
from edgecl.data.sources import absolute_uri, open_source
from edgecl.data.survey import survey
from edgecl.errors import ArtifactError, DeviceError, RecipeError
from edgecl.evaluate.cost import cost_of_recipe
from edgecl.nets.given import HUB, HUGGING_FACE, load_start
from edgecl.storage.directories import ModelDir
from edgecl.storage.outputs import refuse_existing_file
from edgecl.storage.records import MADE_BY, Proposal, Timing
from edgecl.storage.writing import disk_errors, write_bytes
from edgecl.train.timing import look_at_machine, time_steps

_SMALLEST_BATCH = 32


def init(
    photos: str,
    *,
    out: Path,
    labels: str | None = None,
    target: str | None = None,
    hours: float | None = None,
    weights: str | None = None,
    force: bool = False,
) -> Proposal:
    """Look at pictures and at this machine, and write a recipe for them.

    `edgecl.api.init` says what the arguments are and what is raised.
    """
    if out.suffix != ".toml":
        raise RecipeError(f"'{out}' is no name of a recipe", hint="let it end in .toml")
    refuse_existing_file(out, force=force)
    device = None if target is None else read_target(target)
    given = None if weights is None else _settings_of(weights)
    source = open_source(photos)
    labelled = None if labels is None else open_source(labels)
    found = survey(source, labelled).model_copy(update={"uri": absolute_uri(photos)})
    machine = look_at_machine()
    choice = choose_recipe(found, machine, target=device, weights=given)
    if weights is not None:
        recipe = choice.recipe
        load_start(weights, host=recipe.host, width=recipe.slim.width, data=recipe.data)
    choice, timing = _timed(choice, source)
    choice = choose_length(choice, found, timing, hours=hours)
    taken = hours_of(choice, found, timing)
    advice, why = advise(choice, found, hours=taken)
    cost = cost_of_recipe(choice.recipe, recipe_name=out.stem, images=found.images).training
    result = Proposal(
        recipe=str(out),
        advice=advice,
        why=why,
        base=choice.base,
        reasons=choice.reasons,
        hours=round(taken, 3),
        total_flops=cost.total_flops,
        survey=found,
        machine=machine,
        timing=timing,
    )
    text = recipe_text(choice, _header(result, labels=labels, target=target, weights=weights))
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, text.encode())
    return result


def _settings_of(weights: str) -> dict[str, Any]:
    """Return the settings that follow from given weights: of a model directory its own net and pictures.

    Raises:
        ArtifactError: there are none.
    """
    if weights == HUB or weights.startswith(HUGGING_FACE):
        return {"host.init": weights}
    path = Path(weights).absolute()
    if not path.exists():
        raise ArtifactError(f"there is neither a file of weights nor a model directory at '{weights}'")
    if path.is_file():
        return {"host.init": str(path)}
    record = ModelDir(weights).read()
    return {
        "host.init": str(path),
        "host.arch": record.arch,
        "host.width": record.width,
        "slim.width": record.width,
        "host.stem_stride": record.stem_stride,
        "data.mean": record.preprocessing.mean,
        "data.std": record.preprocessing.std,
    }


def _timed(choice: Choice, source: ImageSource) -> tuple[Choice, Timing]:
    """Time steps, with smaller batches where they do not fit into a GPU's memory."""
    while True:
        try:
            return choice, time_steps(choice.recipe, source)
        except torch.OutOfMemoryError:
            batch = choice.recipe.data.batch_size
            if batch <= _SMALLEST_BATCH:
                raise DeviceError(
                    f"a step of {batch} pictures does not fit into the memory of the GPU",
                    hint="close other programs on it",
                ) from None
        choice = with_batch(choice, batch // 2, because="twice as many do not fit into the memory of the GPU")


def _header(found: Proposal, *, labels: str | None, target: str | None, weights: str | None) -> list[str]:
    """Return what stands above the recipe: the advice, the commands, what it costs and what it rests on."""
    recipe, name = shlex.quote(found.recipe), Path(found.recipe).stem
    fine_tune = shlex.join(
        [
            "edgecl",
            "finetune",
            weights or "WEIGHTS",
            "--data",
            labels or "LABELLED",
            "--out",
            "models/classifier",
        ]
    )
    return [
        f"{found.advice.capitalize()}: {found.why}.",
        "",
        *(
            [
                f"  {fine_tune}",
                "",
                "where the weights are a model directory. To pretrain all the same, or to compare:",
                "",
            ]
            if found.advice == "fine-tune"
            else []
        ),
        f"  edgecl pretrain {recipe} --out runs/{name}",
        f"  edgecl run {recipe} --out runs/{name}"
        + (f" --target {target}" if target else "")
        + "   # the whole road",
        "",
        f"Price: {found.total_flops:.4g} FLOPs, projector apart; {length_in_words(found.hours)} on this machine at the",
        "timed rate, reading the pictures for the first time apart. `--hours` chooses the length.",
        "",
        *describe(found.survey, found.machine, found.timing),
        "",
        f"It is the packaged recipe `{found.base}`, whose header says what that rests on, with the changes that have a",
        f"reason beside them. Written by {MADE_BY}, `edgecl init`.",
    ]
